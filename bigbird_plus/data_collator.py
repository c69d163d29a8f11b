"""Batches without padding: documents behind one another in one row, with labels for every head."""

from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

LABELS = ("labels", "label", "label_ids")
OF_TOKENS = ("token_type_ids", "global_attention_mask")
OF_DOCUMENTS = ("next_sentence_label",)


class DataCollatorForDocuments(DataCollatorWithFlattening):
    """Puts the documents of a batch into one row, as `DataCollatorWithFlattening` of transformers does, and hands on
    what that drops or does not take: labels of whole documents and of first tokens, `token_type_ids`,
    `global_attention_mask` and `next_sentence_label`. Nor does it make labels where there are none.

    Args:
        masking: what makes of a list of one document a batch for masked language modelling, as
            `DataCollatorForLanguageModeling(tokenizer)`; None for documents that have their labels.
        **kwargs: those of `DataCollatorWithFlattening`.
    """

    def __init__(self, masking: Callable[[list], Mapping] | None = None, **kwargs):
        super().__init__(**kwargs)
        self.masking = masking

    def __call__(self, features: list[Mapping]) -> dict:
        """The row.

        Args:
            features: of each document `input_ids`, and perhaps `labels` (or `label`, `label_ids`): a list of whole
                numbers, one for each token; or else of the document a number, or a list of floats, one a class.

        Returns:
            What `DataCollatorWithFlattening` returns, `[1, tokens]` each. `labels` of tokens are `[1, tokens]`, those
            of documents `[documents]` or `[documents, num_labels]`; without any in `features` there are none.

        Raises:
            ValueError: for a document with padding, or one that has not one value for each of its tokens.
        """
        documents = [self._as_lists(feature) for feature in features]
        row = super().__call__([{"input_ids": document["input_ids"]} for document in documents])
        del row["labels"]  # made of input_ids
        for name in (*LABELS, *OF_TOKENS, *OF_DOCUMENTS):
            if documents[0].get(name) is not None:
                row["labels" if name in LABELS else name] = _values(name, documents)
        return row

    def _as_lists(self, feature: Mapping) -> dict:
        if self.masking is not None:
            feature = {name: values[0] for name, values in self.masking([feature]).items()}
        document = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in feature.items()}
        if not all(document.get("attention_mask", [])):
            raise ValueError("attention_mask of a document has zeros. Give documents without padding.")
        return document


def _values(name: str, documents: list[dict]) -> Tensor:
    """Those of all documents."""
    values = [document[name] for document in documents]
    if name not in OF_TOKENS and not all(_is_of_tokens(value) for value in values):
        return torch.tensor(values)
    for value, document in zip(values, documents, strict=True):
        tokens = len(document["input_ids"])
        if len(value) != tokens:
            raise ValueError(
                f"{name} of a document has {len(value)} whole numbers, but input_ids have {tokens} tokens. Give one "
                "for each token; or one number for a document, or a list of floats."
            )
    return torch.tensor([list(chain.from_iterable(values))])


def _is_of_tokens(value) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) for one in value)
