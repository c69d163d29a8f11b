"""FlexAttention against the definition, on the CPU. A kernel takes its time to compile: few, each used for much."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from bigbird_plus import BigBirdConfig, BigBirdModel, Sparsity, block_sparse_attention
from bigbird_plus.attention import full
from bigbird_plus.attention.impl import flex, reference
from bigbird_plus.attention.masks import FullMask

from ..peers import own_random_blocks, random_ids, scale_weights, tiny_settings

pytestmark = pytest.mark.torch_only

REPEATING = Sparsity(num_attention_heads=2, block_size=32, num_random_blocks=1)
WIDE = Sparsity(
    num_attention_heads=2, block_size=32, num_random_blocks=1, num_sliding_window_blocks=5, num_global_blocks=3
)
OWN = Sparsity(2, 32, num_random_blocks=3, global_block_indices=(0, 1), random_blocks=own_random_blocks(2, 7, 3))


def random_tensors(batch, length, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 2, length, dim, generator=generator).to(dtype) for _ in range(3)]


def padding(batch, length):
    """Holes everywhere, whole blocks without a token, and a last row without any."""
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) < 0.8
    mask[:, length // 2 : length // 2 + 100] = False
    mask[-1] = False
    return mask


def check(pattern, *, padded, batch=2):
    tensors = random_tensors(batch, pattern.num_blocks * 32)
    mask = padding(batch, tensors[0].shape[2]) if padded else None
    context = flex.forward(*tensors, pattern, mask, scaling=0.3)
    expected, _ = reference.block_sparse_attention(*tensors, pattern, mask, scaling=0.3)
    torch.testing.assert_close(context, expected, atol=1e-5, rtol=1e-5)
    if padded:
        assert (context.transpose(1, 2)[~mask] == 0).all()


def repeating_pattern(num_blocks):
    """With random blocks that stand anywhere: among global ones, in the window, twice or in unused places."""
    blocks = np.random.RandomState(0).randint(-1, num_blocks, (2, num_blocks, 3))
    pattern = replace(REPEATING.structure(num_blocks), random_blocks=blocks)
    assert pattern.counts.max() > 2
    return pattern


@torch.no_grad()
def test_one_kernel_for_all_lengths_with_padding_and_blocks_read_again():
    """The first length has as many blocks as a block has tokens, which must not tie the two together."""
    torch._dynamo.reset()
    counters.clear()
    for num_blocks, batch in ((32, 3), (9, 2), (11, 4)):
        check(repeating_pattern(num_blocks), padded=True, batch=batch)
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_one_kernel_for_all_lengths_in_evaluation():
    torch._dynamo.reset()
    counters.clear()
    for num_blocks, batch in ((12, 3), (15, 4)):
        pattern = REPEATING.pattern(num_blocks)
        assert pattern.counts.max() == 2
        check(pattern, padded=False, batch=batch)
    assert counters["stats"]["unique_graphs"] == 1


def test_lists_of_blocks():
    """Without padding no block is masked. With it, only those that have some are, and those with nothing else are not
    read at all."""
    reads = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert flex._make_block_mask(reads, None, 32).full_kv_indices is None
    mask = torch.arange(96)[None] < 50
    lists = flex._make_block_mask(reads, mask, 32)
    assert lists.kv_num_blocks.tolist() == [[[1, 1, 0]]]
    assert lists.full_kv_num_blocks.tolist() == [[[1, 1, 0]]]
    assert lists.kv_indices[0, 0, 0, 0] == 1
    assert lists.full_kv_indices[0, 0, 0, 0] == 0
    assert lists.q_num_blocks.tolist() == [[[0, 2, 0]]]
    assert lists.full_q_num_blocks.tolist() == [[[2, 0, 0]]]
    tables = (lists.kv_indices, lists.q_indices, lists.full_kv_indices, lists.full_q_indices)
    assert all(table.is_contiguous() for table in tables)  # the kernels on GPUs take them to be


@pytest.mark.parametrize("pattern", [REPEATING.pattern(14), repeating_pattern(14)], ids=["evaluation", "random"])
def test_what_is_read_again_makes_up_the_counts(pattern):
    reads, again = flex._make_plan(pattern, 2, torch.device("cpu"))
    log_counts = torch.zeros(2, 14, 14).masked_fill(~reads[0], -torch.inf)
    for block, gain in again:
        block, gain = (table[: 2 * 14].view(2, 14, 1) for table in (block, gain))
        log_counts.scatter_add_(2, block.clamp(min=0).long(), gain)
    torch.testing.assert_close(log_counts.exp(), torch.from_numpy(pattern.counts).float().expand(2, -1, -1))


@pytest.mark.parametrize("pattern", [WIDE.pattern(14), OWN.pattern(3), OWN.pattern(14)], ids=["wide", "short", "own"])
def test_nothing_is_looked_up_where_nothing_is_read_again(pattern):
    reads, again = flex._make_plan(pattern, 2, torch.device("cpu"))
    assert again is None
    np.testing.assert_array_equal(reads[0], pattern.counts > 0)


def test_blocks_that_are_global_by_index_are_read():
    sparsity = Sparsity(num_attention_heads=2, block_size=32, num_random_blocks=1, global_block_indices=(0, 5, -3))
    pattern = sparsity.pattern(14)
    reads, again = flex._make_plan(pattern, 2, torch.device("cpu"))
    assert again is None
    np.testing.assert_array_equal(reads[0].long(), pattern.counts)


@pytest.mark.parametrize("block_size", [1, 16, 48])
def test_other_block_sizes_are_refused(block_size):
    tensors = random_tensors(1, 12 * block_size)
    with pytest.raises(ValueError, match=rf"block_size is {block_size}.*attn_implementation='sdpa'"):
        block_sparse_attention(*tensors, block_size=block_size, num_random_blocks=1, implementation="flex_attention")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_and_float64_on_a_cpu_are_those_of_the_default_engine(dtype):
    tensors = [tensor.requires_grad_(dtype == torch.float32) for tensor in random_tensors(1, 9 * 32, dtype=dtype)]
    how = {"block_size": 32, "num_random_blocks": 1, "scaling": 0.3}
    contexts = [block_sparse_attention(*tensors, **how, implementation=name) for name in ("flex_attention", "sdpa")]
    assert torch.equal(*contexts)
    if dtype == torch.float32:
        grads = [torch.autograd.grad(context.square().sum(), tensors) for context in contexts]
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("length", [100, 300])
def test_models_train_and_decode_on_a_cpu(length):
    """Full attention, sparse attention and decoders, each with padding: what FlexAttention cannot, others do."""
    ids = random_ids(2, length)
    mask = (torch.arange(length) < torch.tensor([[length], [length - 30]])).long()
    for is_decoder in (False, True):
        settings = tiny_settings(
            block_size=32, num_random_blocks=1, max_position_embeddings=320, is_decoder=is_decoder,
            attention_probs_dropout_prob=0.1,
        )  # fmt: skip
        model = scale_weights(BigBirdModel(BigBirdConfig(**settings)))
        states = []
        for name in ("flex_attention", "sdpa"):
            model.set_attn_implementation(name)
            torch.manual_seed(0)
            states.append(model.train()(ids, attention_mask=mask).last_hidden_state)
        torch.testing.assert_close(*states)
        states[0].sum().backward()


class Bidirectional(torch.nn.Module):
    is_causal, scaling, dropout_prob = False, 0.3, 0.0


@torch.no_grad()
def test_full_attention_takes_masks_of_any_length():
    for length in (40, 48, 56):
        tensors = random_tensors(2, length)
        bias = torch.zeros(2, 1, 1, length).masked_fill(~padding(2, length)[:, None, None], -1e30)
        contexts = [
            full.attend(Bidirectional(), *tensors, FullMask(bias), implementation=name)[0]
            for name in ("flex_attention", "eager")
        ]
        torch.testing.assert_close(*contexts, atol=1e-5, rtol=1e-5)
