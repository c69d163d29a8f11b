"""The definition of the attention, held against a definition that is slower still: token by token, in plain Python."""

import math

import numpy as np
import pytest
import torch

from bigbird_plus import Sparsity
from bigbird_plus.attention.impl import reference

pytestmark = pytest.mark.torch_only


def random_tensors(batch, heads, length, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, length, dim, dtype=torch.float64, generator=generator) for _ in range(3)]


def keys_read(token, length, block, random_blocks, extra):
    """The tokens that a token reads in the published shape, straight from the paper, with repetitions."""
    own, last = token // block, length // block - 1
    if own in (0, last):
        blocks = list(range(last + 1))
    else:
        blocks = sorted({0, own - 1, own, own + 1, last}) + list(random_blocks) + [0] * extra
    return [key for read in blocks for key in range(read * block, (read + 1) * block)]


def attend_token_by_token(query, key, value, block, plan, mask, extra):
    """The context and the probabilities of one document, `[heads, length, dim]` and `[heads, length, length]`."""
    heads, length, dim = query.shape
    context, probabilities = np.zeros((heads, length, dim)), np.zeros((heads, length, length))
    for head in range(heads):
        for token in range(length):
            random_blocks = [] if plan is None else plan[head, token // block]
            keys = [k for k in keys_read(token, length, block, random_blocks, extra) if mask[k]]
            if not mask[token] or not keys:
                continue
            scores = [float(query[head, token] @ key[head, k]) / math.sqrt(dim) for k in keys]
            highest = max(scores)
            weights = [math.exp(score - highest) for score in scores]
            for k, weight in zip(keys, weights, strict=True):
                probabilities[head, token, k] += weight / sum(weights)
            context[head, token] = probabilities[head, token] @ value[head].numpy()
    return context, probabilities


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_token_by_token(training, padded):
    block, num_blocks = 2, 13
    length = block * num_blocks
    query, key, value = random_tensors(2, 2, length, 3)
    mask = torch.ones(2, length, dtype=torch.bool)
    if padded:
        mask[1, -7:] = False
        mask[0, 4:5] = False
    pattern = Sparsity(num_attention_heads=2, block_size=block).pattern(num_blocks, layer_idx=4, training=training)
    context, probabilities = reference.block_sparse_attention(
        query, key, value, pattern, mask if padded else None, scaling=3**-0.5
    )
    for row in range(2):
        expected = attend_token_by_token(
            query[row], key[row], value[row], block, pattern.random_blocks, mask[row], pattern.first_block_extra
        )
        np.testing.assert_allclose(context[row], expected[0], atol=1e-12)
        np.testing.assert_allclose(probabilities[row], expected[1], atol=1e-12)


def test_rows_of_real_tokens_sum_to_one_and_others_to_zero():
    query, key, value = random_tensors(1, 2, 48, 4)
    mask = torch.arange(48)[None] < 30
    pattern = Sparsity(num_attention_heads=2, block_size=4, num_random_blocks=1).pattern(12, training=True)
    _, probabilities = reference.block_sparse_attention(query, key, value, pattern, mask, scaling=0.5)
    torch.testing.assert_close(probabilities.sum(-1), mask.double()[:, None].expand(1, 2, -1))
    assert (probabilities[..., 30:] == 0).all()


def test_probabilities_are_part_of_the_graph():
    query, key, value = random_tensors(1, 1, 24, 4)
    mask = torch.arange(24)[None] < 20
    pattern = Sparsity(num_attention_heads=1, block_size=2, num_random_blocks=0).pattern(12)
    context, probabilities = reference.block_sparse_attention(
        query.requires_grad_(), key, value, pattern, mask, scaling=0.5
    )
    probabilities.retain_grad()
    context.square().sum().backward()
    assert probabilities.grad.abs().sum() > 0
    assert query.grad.abs().sum() > 0


def test_dense_attention_is_that_of_torch():
    query, key, value = random_tensors(2, 3, 10, 4)
    bias = torch.randn(2, 1, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    context, probabilities = reference.dense_attention(query, key, value, bias, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=0.3)
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(probabilities @ value, context)


def test_dropout_drops_and_rescales():
    query, key, value = random_tensors(1, 1, 400, 4)
    _, probabilities = reference.dense_attention(query, key, value, scaling=0.5, dropout=0.25)
    _, kept = reference.dense_attention(query, key, value, scaling=0.5)
    dropped = probabilities == 0
    assert abs(dropped.double().mean() - 0.25) < 0.01
    torch.testing.assert_close(probabilities[~dropped], kept[~dropped] / 0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nothing_to_read_stays_finite_in_half_precision(dtype):
    query, key, value = (tensor.to(dtype) for tensor in random_tensors(2, 1, 24, 4))
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[0] = True
    pattern = Sparsity(num_attention_heads=1, block_size=2, num_random_blocks=0).pattern(12)
    context, probabilities = reference.block_sparse_attention(
        query * 100, key * 100, value, pattern, mask, scaling=0.5
    )
    assert context.dtype == probabilities.dtype == dtype
    assert context.isfinite().all()
    assert (context[1] == 0).all()
    assert (probabilities[1] == 0).all()
