"""Queries to which every key is hidden: their outputs, and the gradients through them, are transformers' own."""

import pytest
import torch

from bigbird_plus.attention.full import attend
from bigbird_plus.attention.masks import key_mask_of

from ..peers import make_pair, random_ids, random_inputs
from .comparison import LOSS_TOLERANCE, assert_equal_gradients

IMPLEMENTATIONS = ["sdpa", "eager"]


def compare(name, inputs, implementation, **settings):
    """Losses and gradients."""
    ours, theirs = make_pair(name, **settings)
    ours.set_attn_implementation(implementation)
    losses = [model.train()(**inputs).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    assert abs(losses[0] - losses[1]) <= LOSS_TOLERANCE
    assert_equal_gradients(ours, theirs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("attention_type", "length"), [("original_full", 120), ("block_sparse", 80)])
def test_left_padding_of_decoders(attention_type, length, implementation):
    """The place before the first token predicts it, and so counts in the loss."""
    ids, mask = random_ids(2, length), torch.ones(2, length, dtype=torch.long)
    mask[0, :60], mask[1, :30] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
    compare("BigBirdForCausalLM", inputs, implementation, is_decoder=True, attention_type=attention_type)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [40, 130])
@pytest.mark.parametrize(
    "name", ["BigBirdForSequenceClassification", "BigBirdForMultipleChoice", "BigBirdForPreTraining"]
)
def test_a_document_of_nothing_but_padding(name, length, implementation):
    inputs = random_inputs(name, 2, length)
    inputs["attention_mask"].view(-1, length)[-1] = 0
    compare(name, inputs, implementation)


def test_an_encoder_that_is_all_padding():
    """As the definition has it: the built-in decoder reads the padding of encoders."""
    ours, _ = make_pair("BigBirdForCausalLM", is_decoder=True, add_cross_attention=True)
    definition, _ = make_pair("BigBirdForCausalLM", is_decoder=True, add_cross_attention=True)
    definition.set_attn_implementation("eager")
    states = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    mask, ids = torch.ones(2, 9, dtype=torch.long), random_ids(2, 30)
    mask[1] = 0
    inputs = {"input_ids": ids, "labels": ids, "encoder_hidden_states": states, "use_cache": False}
    losses = [model(**inputs, encoder_attention_mask=mask).loss for model in (ours, definition)]
    assert abs(losses[0] - losses[1]) <= LOSS_TOLERANCE
    for loss in losses:
        loss.backward()
    assert_equal_gradients(ours, definition)


class Layer(torch.nn.Module):
    is_causal, scaling, dropout_prob = False, 0.3, 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype):
    """Context and gradients agree with the definition, no further apart than it is from float64."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 2, 20, 8, generator=generator).to(dtype) for _ in range(3)]
    mask = torch.rand(3, 20, generator=generator) < 0.5
    mask[1] = False
    weight = torch.randn(3, 2, 20, 8, generator=generator)

    def results(implementation, dtype):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        context, _ = attend(Layer(), *inputs, key_mask_of(mask, dtype, implementation), implementation=implementation)
        return [context, *torch.autograd.grad((context * weight.to(dtype)).sum(), inputs)]

    exact, definition, actual = results("eager", torch.float64), results("eager", dtype), results("sdpa", dtype)
    for wanted, one, other in zip(exact, definition, actual, strict=True):
        allowed = 4 * (one - wanted).abs().max() + 8 * torch.finfo(dtype).eps
        assert (other - wanted).abs().max() <= allowed
