"""One way through the whole package, quick enough to run on every version of transformers."""

import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

import bigbird_plus
from bigbird_plus.demo import document


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForMaskedLM.from_pretrained(checkpoint)


def test_auto_classes_give_ours(model, tokenizer):
    assert type(model) is bigbird_plus.BigBirdForMaskedLM
    assert type(tokenizer) is bigbird_plus.BigBirdTokenizerFast


def test_token_ids(tokenizer):
    assert tokenizer("Hello World!").input_ids == [65, 18536, 2260, 101, 66]
    assert tokenizer("Plants create [MASK] through").input_ids == [65, 39370, 2352, 67, 933, 66]
    assert len(tokenizer) == 50358


def test_fill_mask(checkpoint):
    fill = pipeline("fill-mask", model=str(checkpoint), top_k=3)
    assert type(fill.model) is bigbird_plus.BigBirdForMaskedLM
    predictions = fill(document()[:6000] + " [MASK]")
    assert len(predictions) == 3
    assert all(0 < prediction["score"] < 1 for prediction in predictions)


def test_logits_are_those_of_transformers(checkpoint, model, tokenizer):
    """On files that we have written, read sparsely and in full."""
    theirs = transformers.BigBirdForMaskedLM.from_pretrained(checkpoint)
    for length in (1000, 100):  # in this order: after a short input theirs reads everything in full
        inputs = tokenizer(document(), truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=2e-5)


def test_a_training_step_lowers_the_loss(checkpoint, tokenizer):
    model = AutoModelForMaskedLM.from_pretrained(checkpoint).train()
    inputs = tokenizer(document(), truncation=True, max_length=1000, return_tensors="pt")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(**inputs, labels=inputs["input_ids"]).loss
    before.backward()
    optimizer.step()
    assert model(**inputs, labels=inputs["input_ids"]).loss < before - 0.01


def test_saving_and_loading(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    inputs = AutoTokenizer.from_pretrained(tmp_path)("Hello World!", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[65, 18536, 2260, 101, 66]]
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
