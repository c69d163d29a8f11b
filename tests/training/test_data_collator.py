"""Documents in one row with their labels: for heads of tokens, of documents and for masked words, under `Trainer`."""

import pytest
import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorWithFlattening

import bigbird_plus
from bigbird_plus import DataCollatorForDocuments
from tests.training.common import make_trainer, tiny_model

LENGTHS = (100, 30, 95, 7)  # sparse attention begins at 89
NAMES = ["BigBirdForTokenClassification", "BigBirdForSequenceClassification", "BigBirdForMaskedLM"]


def make_documents(name):
    draw = torch.Generator().manual_seed(0)
    documents = [{"input_ids": torch.randint(7, 90, (length,), generator=draw).tolist()} for length in LENGTHS]
    for number, document in enumerate(documents):
        is_of_documents = name == "BigBirdForSequenceClassification"
        document["labels"] = number % 2 if is_of_documents else [token % 2 for token in document["input_ids"]]
    return documents


def loss_alone(model, documents):
    """The mean over all labels of what the model says of each document alone."""
    losses = []
    for document in documents:
        labels = torch.tensor([document["labels"]])
        loss = model(input_ids=torch.tensor([document["input_ids"]]), labels=labels).loss
        losses.append(loss * (labels != -100).sum())
    return sum(losses) / sum((torch.tensor(document["labels"]) != -100).sum() for document in documents)


@pytest.mark.parametrize("name", NAMES)
def test_trained_as_each_document_alone(name, tmp_path):
    model, documents = tiny_model(name), make_documents(name)
    row = DataCollatorForDocuments()(documents)
    assert row["input_ids"].shape == (1, sum(LENGTHS))
    assert row["labels"].shape == ((4,) if name == "BigBirdForSequenceClassification" else (1, sum(LENGTHS)))
    with torch.no_grad():
        expected = loss_alone(model.eval(), documents)
        torch.testing.assert_close(model(**row).loss, expected, rtol=0, atol=5e-6)
    trainer = make_trainer(model, documents, tmp_path, data_collator=DataCollatorForDocuments(), logging_steps=1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_words_masked_by_transformers(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bigbird_plus.demo_checkpoint())
    documents = [{"input_ids": tokenizer(text)["input_ids"]} for text in 2 * ["And God said " * 9, "Let it be " * 30]]
    collator = DataCollatorForDocuments(masking=DataCollatorForLanguageModeling(tokenizer))
    row = collator(documents)
    assert row["input_ids"].shape == row["labels"].shape == (1, sum(len(one["input_ids"]) for one in documents))
    is_masked = row["labels"] != -100
    assert 0.05 < is_masked.float().mean() < 0.3
    words = torch.cat([torch.tensor(one["input_ids"]) for one in documents])[None]
    assert torch.equal(row["labels"][is_masked], words[is_masked])
    assert torch.equal(row["input_ids"][~is_masked], words[~is_masked])
    model = tiny_model("BigBirdForMaskedLM", vocab_size=len(tokenizer))
    make_trainer(model, documents, tmp_path, data_collator=collator).train()


def test_where_that_of_transformers_lacks_labels():
    documents = make_documents("BigBirdForSequenceClassification")
    with pytest.raises(TypeError):
        DataCollatorWithFlattening()(documents)
    tagged = make_documents("BigBirdForTokenClassification")
    assert DataCollatorWithFlattening()(tagged)["labels"][0, 0] == -100  # the first token's label is gone
    assert DataCollatorForDocuments()(tagged)["labels"][0, 0] == tagged[0]["labels"][0]


def test_other_values_of_tokens_and_of_documents():
    documents = [
        {"input_ids": torch.arange(7, 7 + length), "token_type_ids": [1] * length, "label": [0.0, 1.0]}
        for length in (3, 5)
    ]
    row = DataCollatorForDocuments(return_flash_attn_kwargs=True)(documents)
    assert row["token_type_ids"].tolist() == [[1] * 8]
    assert row["labels"].tolist() == [[0.0, 1.0]] * 2
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert row["cu_seq_lens_q"].tolist() == [0, 3, 8]
    assert "labels" not in DataCollatorForDocuments()([{"input_ids": [7, 8]}])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"input_ids": [7, 8], "attention_mask": [1, 0]}, "without padding"),
        ({"input_ids": [7, 8], "labels": [1, 1, 1]}, "labels of a document has 3 whole numbers"),
        ({"input_ids": [7, 8], "token_type_ids": [0]}, "token_type_ids of a document"),
    ],
)
def test_documents_that_do_not_fit(document, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForDocuments()([document])
