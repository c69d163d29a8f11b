"""Training equals that of transformers' BigBird: losses, gradients, and so the random blocks."""

import pytest
import torch

from ..peers import TASK_MODELS, make_pair, random_inputs
from .comparison import LOSS_TOLERANCE, assert_equal_gradients

LONG = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "block_size": 64,
    "max_position_embeddings": 4096,
}


def compare(name, inputs, **settings):
    """Losses and gradients. A pooling layer that is not used is frozen here, and gets no gradient there."""
    ours, theirs = make_pair(name, **settings)
    losses = []
    for model in (ours, theirs):
        loss = model.train()(**inputs).loss
        loss.backward()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) <= LOSS_TOLERANCE
    assert_equal_gradients(ours, theirs)


@pytest.mark.parametrize("name", TASK_MODELS)
@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
@pytest.mark.parametrize("length", [88, 89, 131])
def test_every_model(name, attention_type, length):
    compare(name, random_inputs(name, 2, length, seed=length), attention_type=attention_type)


@pytest.mark.parametrize("length", [1024, 2048, 3008, 3072, 4090, 4096])
def test_long_inputs(length):
    """The plan of the paper (at 1,024, 3,072, 4,096 tokens, padding to whole blocks included) and the other one."""
    inputs = random_inputs("BigBirdForMaskedLM", 1, length, padded=False)
    inputs["attention_mask"] = (torch.arange(length)[None] < length - 70).long()
    compare("BigBirdForMaskedLM", inputs, **LONG)


@pytest.mark.parametrize(("r", "block_size"), [(1, 8), (2, 16), (4, 4)])
def test_other_sizes(r, block_size):
    length = (5 + 2 * r) * block_size + 20
    inputs = random_inputs("BigBirdForMaskedLM", 2, length)
    compare("BigBirdForMaskedLM", inputs, num_random_blocks=r, block_size=block_size)


def test_shorter_than_the_plan_is_drawn_for():
    inputs = random_inputs("BigBirdForMaskedLM", 1, 1024, padded=False)
    compare("BigBirdForMaskedLM", inputs, **{**LONG, "max_position_embeddings": 2048})


def test_many_layers_draw_from_many_seeds():
    inputs = random_inputs("BigBirdForMaskedLM", 1, 200, padded=False)
    compare("BigBirdForMaskedLM", inputs, num_hidden_layers=6, hidden_size=16)


def test_decoder_with_full_attention():
    inputs = random_inputs("BigBirdForCausalLM", 2, 40) | {"use_cache": False}
    compare("BigBirdForCausalLM", inputs, is_decoder=True, attention_type="original_full")


def test_random_blocks_matter():
    """Guards these tests: with the random blocks of evaluation the loss is another one."""
    ours, _ = make_pair("BigBirdForMaskedLM", **LONG)
    inputs = random_inputs("BigBirdForMaskedLM", 1, 2048, padded=False)
    with torch.no_grad():
        training, evaluation = (ours.train(mode)(**inputs).loss.item() for mode in (True, False))
    assert abs(training - evaluation) > 100 * LOSS_TOLERANCE
