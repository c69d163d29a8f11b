"""`BigBirdTokenizer`: SentencePiece's own segmentation behind the interface of transformers' tokenizers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import AddedToken, PreTrainedTokenizer, PreTrainedTokenizerBase

VOCAB_FILE_NAME = "spiece.model"
TOKENIZER_FILE_NAME = "tokenizer.json"
MODEL_MAX_LENGTH = 4096  # what the published checkpoints were trained with
SPACE = "▁"  # U+2581, which SentencePiece writes for a space

Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def load_sentencepiece(
    vocab_file: str | os.PathLike | None, folder: str | None = None, **sp_model_kwargs
) -> SentencePieceProcessor:
    """Read a SentencePiece model.

    Args:
        vocab_file: path of the model; None if it was looked for in `folder` in vain.
        sp_model_kwargs: arguments of `SentencePieceProcessor`.

    Raises:
        ValueError: the file is missing or is no SentencePiece model. (Not an `OSError` or `RuntimeError`: transformers
            replaces those by messages that do not name the file.)
    """
    path = os.path.join(folder or "", VOCAB_FILE_NAME) if vocab_file is None else os.fspath(vocab_file)
    if not os.path.isfile(path) or vocab_file is None:
        raise ValueError(f"vocab_file {path!r} does not exist or is not a file: a SentencePiece model is needed.")
    processor = SentencePieceProcessor(**sp_model_kwargs)
    try:
        processor.Load(path)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"vocab_file {path!r} ({os.path.getsize(path)} bytes) is not a SentencePiece model: {error} "
            "Fetch the file again; one of a few hundred bytes may be a Git LFS pointer."
        ) from error
    return processor


def read_model_proto(processor: SentencePieceProcessor) -> sentencepiece_model_pb2.ModelProto:
    """The model as a protocol buffer, which knows the type of each piece (the processor's interface does not)."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(processor.serialized_model_proto())
    return proto


def reserved_pieces(proto: sentencepiece_model_pb2.ModelProto) -> set[str]:
    """The user-defined and control pieces of a vocabulary, such as `<ans>` and `<pad>`."""
    return {piece.piece for piece in proto.pieces if piece.type in (Piece.USER_DEFINED, Piece.CONTROL)}


def read_tokenizer_json(tokenizer_file: str | os.PathLike) -> dict[str, Any]:
    """The contents of a `tokenizer.json`.

    Raises:
        ValueError: the file is missing or was not written by the `tokenizers` package.
    """
    path = os.fspath(tokenizer_file)
    try:
        with open(path, encoding="utf-8") as file:
            spec = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer_file {path!r} cannot be read as JSON: {error}") from error
    if not isinstance(spec, dict) or not {"model", "added_tokens"} <= spec.keys():
        raise ValueError(f"tokenizer_file {path!r} is not a tokenizer of the `tokenizers` package.")
    return spec


def raw_text_token(token: str | AddedToken, **flags: bool) -> AddedToken:
    """`token` as one that is searched for in the raw text, with `flags` (`lstrip`, `special`, ...) changed."""
    if isinstance(token, str):
        token = AddedToken(token)
    kept = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")}
    return AddedToken(token.content, **{**kept, **flags}, normalized=False)


def named_tokens(**tokens: str | AddedToken | None) -> dict[str, AddedToken]:
    """The named tokens (`cls_token=...`) as special tokens. The mask stands for a word and the space before it."""
    given = {name: token for name, token in tokens.items() if token is not None}
    return {
        name: raw_text_token(token, special=True, **({"lstrip": True} if name == "mask_token" else {}))
        for name, token in given.items()
    }


def settings_without(reserved: set[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` of a saved tokenizer without the `reserved` pieces that transformers' own classes list among them.

    4.x's fast class saves every reserved piece in `added_tokens_decoder`, 5.x's in `extra_special_tokens`. There they
    would be cut out before SentencePiece sees the text, which gives other ids. Special tokens that somebody chose
    stay, as nobody chooses all reserved pieces. Extra special tokens leave under the name that all versions know.
    """
    kwargs = dict(kwargs)
    added = kwargs.get("added_tokens_decoder") or {}
    kwargs["added_tokens_decoder"] = {
        index: token for index, token in added.items() if token.special or token.content not in reserved
    }
    if isinstance(kwargs.get("extra_special_tokens"), (list, tuple)):
        kwargs["additional_special_tokens"] = kwargs.pop("extra_special_tokens")
    extra = kwargs.pop("additional_special_tokens", None) or []
    if reserved and reserved.issubset(map(str, extra)):
        extra = [token for token in extra if str(token) not in reserved]
    if extra:
        kwargs["additional_special_tokens"] = extra
    return kwargs


class BigBirdTokenizerMixin(PreTrainedTokenizerBase):
    """What the two BigBird tokenizers have in common: the layout `[CLS] A [SEP] B [SEP]`, padding and saving."""

    model_input_names = ["input_ids", "attention_mask"]

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files, *args, **kwargs):
        tokenizer_file = resolved_vocab_files.get("tokenizer_file")
        try:
            return super()._from_pretrained(resolved_vocab_files, *args, **kwargs)
        except (AttributeError, KeyError, TypeError, ValueError):
            if tokenizer_file is not None:
                read_tokenizer_json(tokenizer_file)  # transformers' own errors do not name this file
            raise

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        # Searched for in normalized text, a token would leave spaces at the ends of its neighbours.
        special = {"special": True} if special_tokens else {}
        return super()._add_tokens([raw_text_token(token, **special) for token in new_tokens], special_tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[CLS] A [SEP]` for one sequence of ids, `[CLS] A [SEP] B [SEP]` for two."""
        first = [self.cls_token_id, *token_ids_0, self.sep_token_id]
        return first if token_ids_1 is None else [*first, *token_ids_1, self.sep_token_id]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """0 for `[CLS] A [SEP]`, 1 for `B [SEP]`."""
        first = [0] * (len(token_ids_0) + 2)
        return first if token_ids_1 is None else first + [1] * (len(token_ids_1) + 1)

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 at special tokens, 0 elsewhere.

        Args:
            token_ids_0, token_ids_1: ids of the sequences, before `build_inputs_with_special_tokens`.
            already_has_special_tokens: `token_ids_0` is a finished sequence, and the mask is of its own ids.

        Raises:
            ValueError: `token_ids_1` is given together with `already_has_special_tokens`.
        """
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError("token_ids_1 must be None when token_ids_0 already has its special tokens.")
            special = set(self.all_special_ids)
            return [int(int(token_id) in special) for token_id in token_ids_0]
        first = [1, *[0] * len(token_ids_0), 1]
        return first if token_ids_1 is None else [*first, *[0] * len(token_ids_1), 1]

    def _pad(self, encoded_inputs, *args, **kwargs):
        padded = super()._pad(encoded_inputs, *args, **kwargs)
        marks = padded.get("global_attention_mask")  # optional model input, which transformers leaves unpadded
        if marks is not None:
            padding = [0] * (len(padded["input_ids"]) - len(marks))
            left = (kwargs.get("padding_side") or self.padding_side) == "left"
            padded["global_attention_mask"] = [*padding, *marks] if left else [*marks, *padding]
        return padded

    @staticmethod
    def _vocab_path(save_directory: str | os.PathLike, filename_prefix: str | None) -> str:
        if not os.path.isdir(save_directory):
            raise ValueError(f"save_directory {os.fspath(save_directory)!r} is not a folder.")
        return os.path.join(
            save_directory, f"{filename_prefix}-{VOCAB_FILE_NAME}" if filename_prefix else VOCAB_FILE_NAME
        )


class BigBirdTokenizer(BigBirdTokenizerMixin, PreTrainedTokenizer):
    """BigBird's tokenizer on the `sentencepiece` package: its ids are those of `SentencePieceProcessor.encode`.

    The text of a special token (`[MASK]`) is that token; what stands between special tokens is encoded on its own.

    Args:
        vocab_file: path of a SentencePiece model (`spiece.model`).
        unk_token, bos_token, eos_token, pad_token, sep_token, cls_token: the named special tokens.
        mask_token: the same for masking. It takes the white space on its left, as a masked word brings its own.
        sp_model_kwargs: arguments of `SentencePieceProcessor`; subword sampling for instance is
            `{"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}`.
        kwargs: those of `PreTrainedTokenizer`, such as `padding_side` or `model_max_length` (4096).

    Raises:
        ValueError: `vocab_file` is missing or is no SentencePiece model.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE_NAME}

    def __init__(
        self,
        vocab_file,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        sep_token="[SEP]",
        mask_token="[MASK]",
        cls_token="[CLS]",
        sp_model_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        self.vocab_file = vocab_file
        self.sp_model_kwargs = sp_model_kwargs or {}
        self._use(load_sentencepiece(vocab_file, kwargs.get("name_or_path"), **self.sp_model_kwargs))

        tokens = named_tokens(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            sep_token=sep_token,
            mask_token=mask_token,
            cls_token=cls_token,
        )
        kwargs = settings_without(reserved_pieces(read_model_proto(self.sp_model)), kwargs)
        kwargs.pop("tokenizer_file", None)
        kwargs.setdefault("model_max_length", MODEL_MAX_LENGTH)
        super().__init__(**tokens, sp_model_kwargs=self.sp_model_kwargs, **kwargs)
        self._add_tokens(list(tokens.values()), special_tokens=True)  # saved flags may differ; 5.x forgets all flags

    def _use(self, processor: SentencePieceProcessor) -> None:
        self.sp_model = processor
        self._unk_id = processor.unk_id()
        self._ids = {piece: index for index, piece in enumerate(processor.id_to_piece(list(range(len(processor)))))}

    def __getstate__(self):
        return {**self.__dict__, "sp_model": self.sp_model.serialized_model_proto()}

    def __setstate__(self, state):
        self.__dict__ = state
        processor = SentencePieceProcessor(**self.sp_model_kwargs)
        processor.LoadFromSerializedProto(state["sp_model"])
        self._use(processor)

    @property
    def vocab_size(self) -> int:
        """Number of pieces, without added tokens (`len` counts those, too)."""
        return len(self.sp_model)

    def get_vocab(self) -> dict[str, int]:
        """Piece to id, added tokens included."""
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.sp_model.encode(text.encode(), out_type=str)  # as bytes: a lone surrogate gets a clear error

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._unk_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of `tokens`: spaces for `▁`, none at the start, and one before the mask."""
        mask = self.mask_token
        pieces = (SPACE + token if token == mask else token for token in tokens)
        return "".join(pieces).replace(SPACE, " ").lstrip(" ")

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs) -> str:
        token_ids = [token_ids] if isinstance(token_ids, int) else token_ids
        tokens = self.convert_ids_to_tokens(token_ids, skip_special_tokens=skip_special_tokens)
        text = self.convert_tokens_to_string(tokens)
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `spiece.model` into an existing folder and return its path in a tuple."""
        path = self._vocab_path(save_directory, filename_prefix)
        with open(path, "wb") as file:
            file.write(self.sp_model.serialized_model_proto())
        return (path,)


__all__ = ["BigBirdTokenizer"]
