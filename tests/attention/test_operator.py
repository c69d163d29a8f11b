"""The public operator: any length, errors that name the argument, and what the model's own layer computes."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bigbird_plus import BigBirdConfig, BigBirdModel, Sparsity, block_sparse_attention
from bigbird_plus.attention.impl import reference

from ..peers import random_ids, scale_weights, tiny_settings

pytestmark = pytest.mark.torch_only

SIZES = {"block_size": 8, "num_random_blocks": 1}  # sparse from 57 tokens on


def random_tensors(length, *, batch=2, heads=2, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, length, dim, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
@pytest.mark.parametrize("length", [1, 7, 8, 55, 56])
def test_short_inputs_are_read_in_full(length, implementation):
    tensors = random_tensors(length)
    output = block_sparse_attention(*tensors, **SIZES, implementation=implementation)
    torch.testing.assert_close(output, scaled_dot_product_attention(*tensors), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [57, 63, 64, 100, 128])
def test_long_inputs_follow_the_pattern(length, training):
    tensors = random_tensors(length)
    num_blocks = -(-length // 8)
    padded = [torch.nn.functional.pad(tensor, (0, 0, 0, num_blocks * 8 - length)) for tensor in tensors]
    pattern = Sparsity(num_attention_heads=2, **SIZES).pattern(num_blocks, layer_idx=3, training=training)
    mask = (torch.arange(num_blocks * 8) < length).expand(2, -1)
    expected, _ = reference.block_sparse_attention(*padded, pattern, mask, scaling=0.25)
    for implementation in ("sdpa", "eager"):
        output = block_sparse_attention(
            *tensors, **SIZES, layer_idx=3, training=training, implementation=implementation
        )
        torch.testing.assert_close(output, expected[:, :, :length], atol=1e-5, rtol=1e-5)
    assert (expected[:, :, :length] - scaled_dot_product_attention(*tensors)).abs().max() > 1e-3


@pytest.mark.parametrize("length", [40, 100])
def test_padding_is_not_read(length):
    tensors = random_tensors(length)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[:, 30:] = 0
    output = block_sparse_attention(*tensors, **SIZES, attention_mask=mask)
    changed = [torch.where(mask[:, None, :, None] == 1, tensor, tensor + 5) for tensor in tensors]
    again = block_sparse_attention(*changed, **SIZES, attention_mask=mask.bool())
    torch.testing.assert_close(output[:, :, :30], again[:, :, :30])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [40, 100])
def test_probabilities(length, implementation):
    query, key, value = random_tensors(length)
    arguments = {**SIZES, "implementation": implementation}
    output, probabilities = block_sparse_attention(query, key, value, **arguments, output_attentions=True)
    assert probabilities.shape == (2, 2, length, length)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2, length))
    torch.testing.assert_close(probabilities @ value, output, atol=1e-5, rtol=1e-5)
    assert torch.equal(output, block_sparse_attention(query, key, value, **arguments))


def test_scaling_and_gradients():
    tensors = [tensor.requires_grad_() for tensor in random_tensors(70, dtype=torch.float64)]
    results = []
    for scaling, factor in ((None, 1.0), (0.5, 0.5)):
        output = block_sparse_attention(tensors[0] * factor, *tensors[1:], **SIZES, scaling=scaling)
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)  # 16 ** -0.5 = 0.5 * 0.5


@pytest.mark.parametrize(
    "shape", [{"num_sliding_window_blocks": 5}, {"num_global_blocks": 4}, {"num_random_blocks": 0}]
)
def test_other_shapes(shape):
    tensors = random_tensors(150)
    outputs = [
        block_sparse_attention(*tensors, **{**SIZES, **shape}, implementation=name) for name in ("sdpa", "eager")
    ]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_it_is_what_the_layers_of_the_model_run(training):
    config = BigBirdConfig(**tiny_settings(use_cache=False))
    model = scale_weights(BigBirdModel(config)).train(training)
    model.set_attn_implementation("eager")  # which leaves padding where it is
    attention = model.encoder.layer[1].attention.self
    seen = {}
    attention.register_forward_hook(lambda module, inputs, output: seen.update(states=inputs[0], context=output[0]))
    ids = random_ids(2, 130)
    mask = (torch.arange(130) < torch.tensor([[130], [101]])).long()
    with torch.no_grad():
        model(ids, attention_mask=mask)
        states = seen["states"][:, :130]
        query, key, value = (
            layer(states).view(2, 130, 4, 8).transpose(1, 2)
            for layer in (attention.query, attention.key, attention.value)
        )
        context = block_sparse_attention(
            query, key, value, block_size=8, attention_mask=mask, layer_idx=1, training=training,
            max_position_embeddings=256,
        )  # fmt: skip
    torch.testing.assert_close(context.transpose(1, 2).flatten(2), seen["context"][:, :130], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"attention_mask": torch.ones(2, 99)}, r"attention_mask.*\[2, 100\]"),
        ({"attention_mask": torch.ones(2, 1, 1, 100)}, "attention_mask"),
        ({"implementation": "flash"}, "implementation.*flash"),
        ({"block_size": 0}, "block_size.*0"),
        ({"num_random_blocks": -1}, "num_random_blocks.*-1"),
        ({"num_sliding_window_blocks": 2}, "num_sliding_window_blocks.*2"),
        ({"num_global_blocks": -2}, "num_global_blocks.*-2"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        block_sparse_attention(*random_tensors(100), **{**SIZES, **arguments})


@pytest.mark.parametrize("change", [lambda t: t[0], lambda t: t[:, :, 1:], lambda t: t[..., 1:], lambda t: t[:1]])
def test_tensors_that_do_not_fit_each_other(change):
    query, key, value = random_tensors(60)
    with pytest.raises(ValueError, match="query, key and value"):
        block_sparse_attention(query, change(key), value)
    with pytest.raises(ValueError, match="query, key and value"):
        block_sparse_attention(query, key, change(value))
