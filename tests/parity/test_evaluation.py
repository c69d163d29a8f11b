"""Evaluation equals transformers' BigBird: every model class, both attention types, any length, padded or not."""

import pytest
import torch

from ..peers import MODELS, make_pair, random_inputs
from .comparison import assert_equal_outputs

LENGTHS = [17, 88, 89, 128, 131]  # sparse from 89 tokens on; blocks have 8 tokens


def compare(name, inputs, **settings):
    ours, theirs = make_pair(name, **settings)
    with torch.no_grad():
        assert_equal_outputs(ours(**inputs), theirs(**inputs), inputs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("padded", [False, True])
def test_every_model(name, attention_type, length, padded):
    inputs = random_inputs(name, 2, length, padded=padded, seed=length)
    compare(name, inputs, attention_type=attention_type)


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
@pytest.mark.parametrize("length", [88, 131])
def test_hidden_states(attention_type, length):
    inputs = random_inputs("BigBirdModel", 3, length)
    compare("BigBirdModel", {**inputs, "output_hidden_states": True}, attention_type=attention_type)


@pytest.mark.parametrize("length", [17, 131])
def test_attentions_of_full_attention(length):
    inputs = random_inputs("BigBirdModel", 3, length)
    inputs |= {"output_attentions": True, "output_hidden_states": True}
    compare("BigBirdModel", inputs, attention_type="original_full")


@pytest.mark.parametrize("where", ["left", "anywhere", "a whole row"])
@pytest.mark.parametrize("length", [60, 131])
def test_padding_elsewhere(where, length):
    inputs = random_inputs("BigBirdForMaskedLM", 3, length, padded=False, labels=False)
    mask = torch.ones(3, length, dtype=torch.long)
    if where == "left":
        mask[1, : length // 3] = 0
    elif where == "anywhere":
        mask[torch.rand(3, length, generator=torch.Generator().manual_seed(0)) < 0.3] = 0
        mask[:, 0] = 1
    else:
        mask[2] = 0
    compare("BigBirdForMaskedLM", {**inputs, "attention_mask": mask})


@pytest.mark.parametrize("name", ["BigBirdModel", "BigBirdForSequenceClassification", "BigBirdForMultipleChoice"])
@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
def test_what_is_told_of_a_document_is_told_from_its_first_place(name, attention_type):
    """Padding or not: with padding on the left it is padding."""
    inputs = random_inputs(name, 3, 131)
    inputs |= {key: inputs[key].flip(-1) for key in ("input_ids", "attention_mask")}
    compare(name, inputs, attention_type=attention_type)


@pytest.mark.parametrize(
    "name", ["BigBirdForPreTraining", "BigBirdForMaskedLM", "BigBirdForCausalLM", "BigBirdForTokenClassification"]
)
@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
def test_labels_of_padding_count(name, attention_type):
    inputs = random_inputs(name, 3, 131)
    inputs["labels"] = inputs["labels"].clamp(min=0)
    compare(name, inputs, attention_type=attention_type)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.int32])
def test_masks_of_any_dtype(mask_dtype):
    inputs = random_inputs("BigBirdModel", 2, 100)
    ours, _ = make_pair("BigBirdModel")
    with torch.no_grad():
        expected = ours(**inputs)
        again = ours(**{**inputs, "attention_mask": inputs["attention_mask"].to(mask_dtype)})
    assert torch.equal(again.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("block_size", [4, 16])
def test_other_sizes(r, block_size):
    length = (5 + 2 * r) * block_size + 7
    inputs = random_inputs("BigBirdForMaskedLM", 2, length)
    compare("BigBirdForMaskedLM", inputs, num_random_blocks=r, block_size=block_size)


@pytest.mark.parametrize(("hidden_size", "heads"), [(40, 2), (60, 2), (32, 4), (64, 1)])
def test_other_head_sizes(hidden_size, heads):
    inputs = random_inputs("BigBirdForMaskedLM", 2, 131)
    compare("BigBirdForMaskedLM", inputs, hidden_size=hidden_size, num_attention_heads=heads)


@pytest.mark.parametrize("length", [1024, 2048, 3072, 4096, 4090])
def test_long_inputs(length):
    inputs = random_inputs("BigBirdForMaskedLM", 1, length, padded=False)
    inputs["attention_mask"] = (torch.arange(length)[None] < length - 100).long()
    compare("BigBirdForMaskedLM", inputs, num_attention_heads=2, block_size=64, max_position_embeddings=4096)


@pytest.mark.parametrize("length", [17, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_decoder_with_full_attention(length, padded):
    inputs = random_inputs("BigBirdForCausalLM", 2, length, padded=padded) | {"use_cache": False}
    compare("BigBirdForCausalLM", inputs, is_decoder=True, attention_type="original_full")


@pytest.mark.parametrize("name", MODELS)
def test_weights_matter(name):
    """Guards these tests: with other weights the outputs are far from equal."""
    inputs = random_inputs(name, 2, 131)
    with torch.no_grad():
        first, second = (make_pair(name, seed=seed)[0](**inputs).to_tuple() for seed in (0, 1))
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(first, second, strict=True))
