"""Sparse attention of decoders: the pattern, and every way of computing it, against the definition token by token."""

import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bigbird_plus import Sparsity
from bigbird_plus.attention import common, masks, parts
from bigbird_plus.attention.engines import Choice
from bigbird_plus.attention.impl import flash_cpu, gather, reference
from bigbird_plus.attention.parts import Tokens, decoder_part
from bigbird_plus.attention.random_blocks import CausalPlan

pytestmark = pytest.mark.torch_only

HEADS = 2


def sparsity(window=3, num_global=2, r=3, block=4):
    return Sparsity(
        num_attention_heads=HEADS,
        block_size=block,
        num_random_blocks=r,
        num_sliding_window_blocks=window,
        num_global_blocks=num_global,
    )


def who_reads_whom(sparsity, num_blocks, layer_idx):
    """The definition, block by block: `[heads][row] -> set of blocks`."""
    leading, window = -(-sparsity.num_global_blocks // 2), sparsity.num_sliding_window_blocks
    first_sparse = sparsity.num_global_blocks + window + 2 * sparsity.num_random_blocks
    generator = np.random.RandomState(layer_idx)
    reads = [[set(range(row + 1)) for row in range(num_blocks)] for _ in range(HEADS)]
    for row in range(first_sparse, num_blocks):
        for head in range(HEADS):
            drawn = generator.permutation(np.arange(leading, row - window + 1))[: sparsity.num_random_blocks]
            reads[head][row] = {*range(leading), *range(row - window + 1, row + 1), *drawn.tolist()}
    return reads


def may_read(sparsity, mask, queries, keys, layer_idx):
    """The definition, token by token: `bool`, `[batch, heads, queries, keys]`, for queries at the given places."""
    block = sparsity.block_size
    blocks = who_reads_whom(sparsity, -(-keys // block), layer_idx)
    result = torch.zeros(len(mask), HEADS, len(queries), keys, dtype=torch.bool)
    for row, real in enumerate(mask.tolist()):
        start = real.index(1) if 1 in real else 0
        for index, place in enumerate(queries):
            for key in range(start, place + 1):
                if real[key] and real[place]:
                    for head in range(HEADS):
                        result[row, head, index, key] = (key - start) // block in blocks[head][
                            (place - start) // block
                        ]
    return result


def attend_by_definition(query, key, value, reads):
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    probabilities = scores.masked_fill(~reads, -torch.inf).softmax(-1).nan_to_num(0.0)
    return probabilities @ value, probabilities


def attend(tensors, sparsity, mask, *, past=0, engine=flash_cpu, output_attentions=False):
    query, key, value = tensors
    tokens = Tokens(
        len(query),
        torch.arange(query.shape[2]) + past,
        query.dtype,
        attention_mask=mask,
        past=past,
        keys=key.shape[2],
    )
    part = decoder_part(sparsity, tokens, Choice("", engine, {}))
    layer = SimpleNamespace(layer_idx=1, heads=list(range(HEADS)), scaling=query.shape[-1] ** -0.5)
    return part.attend(layer, query, key, value, output_attentions)


def random_tensors(batch, length, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, length, 8, generator=generator, dtype=dtype) for _ in range(3)]


def random_mask(kind, batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return torch.ones(batch, length, dtype=torch.long)
    if kind == "holes":
        return (torch.rand(batch, length, generator=generator) < 0.8).long()
    real = torch.randint(0 if kind == "empty" else 1, length + 1, (batch, 1), generator=generator)
    mask = (torch.arange(length) < real).long()
    return mask if kind == "right" else mask.flip(1)


MASKS = ["none", "left", "right", "holes", "empty"]


# ---------------------------------------------------------------------------------------------------------------------
# The pattern
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("num_global", [0, 1, 2, 3])
@pytest.mark.parametrize("r", [0, 1, 3])
def test_counts_are_the_definition(window, num_global, r):
    some = sparsity(window, num_global, r)
    num_blocks = some.full_attention_length // some.block_size + 9
    counts = np.broadcast_to(some.causal_pattern(num_blocks, layer_idx=2).counts, (HEADS, num_blocks, num_blocks))
    expected = who_reads_whom(some, num_blocks, layer_idx=2)
    for head in range(HEADS):
        for row in range(num_blocks):
            assert counts[head, row].max() == 1
            assert set(np.flatnonzero(counts[head, row]).tolist()) == expected[head][row]


def test_a_longer_plan_extends_a_shorter_one():
    how = {"num_heads": 3, "num_random_blocks": 2, "first_row": 9, "num_leading": 1, "window": 3, "layer_idx": 5}
    grown, at_once = CausalPlan(**how), CausalPlan(**how)
    stages = [grown.blocks(num_blocks).copy() for num_blocks in (4, 10, 11, 30, 200)]
    expected = at_once.blocks(200)
    for stage in stages:
        assert stage.shape == (3, stage.shape[1], 2)
        assert (stage == expected[:, : stage.shape[1]]).all()
    for row in range(9, 200):
        for drawn in expected[:, row].tolist():
            assert len(set(drawn)) == 2
            assert 1 <= min(drawn) <= max(drawn) <= row - 3


def test_a_plan_grown_by_many_threads_is_the_same():
    how = {"num_heads": 2, "num_random_blocks": 3, "first_row": 11, "num_leading": 1, "window": 3, "layer_idx": 0}
    expected, plan, wrong = CausalPlan(**how).blocks(400), CausalPlan(**how), []

    def ask(seed):
        for num_blocks in np.random.default_rng(seed).integers(1, 400, 50):
            if not np.array_equal(plan.blocks(num_blocks), expected[:, :num_blocks]):
                wrong.append(num_blocks)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_else_changes_the_plan():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    plain = sparsity().causal_pattern(40, layer_idx=3).counts
    others = {"max_position_embeddings": 64, "eval_random_blocks": True}
    changed = Sparsity(num_attention_heads=HEADS, block_size=4, **others).causal_pattern(40, layer_idx=3).counts
    assert (plain == changed).all()
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert (plain != sparsity().causal_pattern(40, layer_idx=4).counts).any()
    assert (plain[0] != plain[1]).any()


def test_pruned_heads_leave_the_others_their_blocks():
    pattern = sparsity().causal_pattern(20, layer_idx=1)
    assert (pattern.for_heads([1]).counts == pattern.counts[1:]).all()
    assert pattern.for_heads([0, 1]) is pattern


# ---------------------------------------------------------------------------------------------------------------------
# The engines
# ---------------------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    some = sparsity(
        draw(st.sampled_from([1, 3, 5])), draw(st.integers(0, 3)), draw(st.integers(0, 2)), draw(st.integers(1, 5))
    )
    length = draw(st.integers(1, some.full_attention_length + 6 * some.block_size))
    return some, length, draw(st.sampled_from(MASKS)), draw(st.integers(0, 99))


@given(cases())
@settings(max_examples=40)
@example((sparsity(), 70, "none", 0))
@example((sparsity(), 70, "left", 1))
@example((sparsity(), 71, "holes", 2))
@example((sparsity(1, 0, 0), 30, "left", 3))
@example((sparsity(), 10, "right", 4))
def test_a_pass_from_the_start(case):
    some, length, kind, seed = case
    mask = random_mask(kind, 3, length, seed)
    tensors = [tensor.requires_grad_() for tensor in random_tensors(3, length, seed)]
    expected, probabilities = attend_by_definition(*tensors, may_read(some, mask, range(length), length, 1))
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected_grads = torch.autograd.grad((expected * weight).sum(), tensors)

    def check(**how):
        context, returned = attend(tensors, some, mask, output_attentions=True, **how)
        torch.testing.assert_close(context, expected)
        torch.testing.assert_close(returned, probabilities)
        for actual, wanted in zip(torch.autograd.grad((context * weight).sum(), tensors), expected_grads, strict=True):
            torch.testing.assert_close(actual, wanted)

    for engine in (flash_cpu, reference, gather):
        check(engine=engine)
    with mock.patch.object(common, "CHUNK_BYTES", 1):
        check()


@given(cases(), st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 9))
@settings(max_examples=40)
@example((sparsity(), 90, "none", 0), [1, 5, 30, 7, 1], 0)
@example((sparsity(), 90, "left", 1), [44, 1, 1, 1, 2], 5)
@example((sparsity(), 90, "holes", 2), [13], 0)
def test_pieces_that_a_cache_goes_before(case, sizes, free):
    """Pieces of any sizes, with and without free places in the cache, read what the whole reads."""
    some, length, kind, seed = case
    mask = random_mask(kind, 2, length, seed)
    query, key, value = random_tensors(2, length, seed)
    expected, _ = attend_by_definition(query, key, value, may_read(some, mask, range(length), length, 1))
    past = 0
    while past < length:
        size = min(sizes[past % len(sizes)], length - past)
        end = past + size
        held = [nn_pad(tensor[:, :, :end], free) for tensor in (key, value)]
        for engine in (flash_cpu, reference):
            context, probabilities = attend(
                (query[:, :, past:end], *held),
                some,
                mask[:, :end],
                past=past,
                engine=engine,
                output_attentions=True,
            )
            torch.testing.assert_close(context, expected[:, :, past:end])
            assert probabilities.shape == (2, HEADS, size, end + free)
            real = mask[:, None, past:end].expand(-1, HEADS, -1).double()
            torch.testing.assert_close(probabilities.sum(-1), real)
        past = end


def nn_pad(tensor, free):
    """Free places of a static cache; what they hold must not matter."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, free), value=100.0)


def test_a_piece_that_nothing_is_known_of():
    """While a graph is traced, and on devices whose values Python does not look at, masks hold all that is known."""
    some, length, past = sparsity(), 90, 61
    mask = random_mask("left", 2, length, 3)
    mask[1] = 1
    query, key, value = random_tensors(2, length)
    expected, _ = attend_by_definition(query, key, value, may_read(some, mask, range(length), length, 1))
    held = [nn_pad(tensor, 7).contiguous() for tensor in (key, value)]
    unknown = [mock.patch.object(module, "may_read_values", lambda tensor: False) for module in (masks, parts)]
    with unknown[0], unknown[1]:
        whole, _ = attend((query, key, value), some, mask, engine=gather)
        by_number, _ = attend((query[:, :, past:], *held), some, mask, past=past, engine=gather)
        by_tensor, _ = attend((query[:, :, past:], *held), some, mask, past=torch.tensor(past), engine=gather)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(by_number, expected[:, :, past:])
    torch.testing.assert_close(by_tensor, expected[:, :, past:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("past", [0, 70])
def test_reduced_precision(dtype, past):
    """No further from float64 than the definition computed in the same precision, up to a small factor."""
    some, length = sparsity(), 90
    mask = random_mask("left", 2, length, 3)
    exact = [tensor.to(dtype).double() for tensor in random_tensors(2, length)]
    exact[0] = exact[0][:, :, past:]
    low = [tensor.to(dtype) for tensor in exact]
    expected, _ = attend(exact, some, mask, past=past, engine=reference)
    errors = []
    for engine in (reference, flash_cpu):
        context, _ = attend(low, some, mask, past=past, engine=engine)
        assert context.dtype is dtype
        errors.append((context.double() - expected).abs().max().item())
    assert errors[1] <= 2 * errors[0] + 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


class NewElements(TorchDispatchMode):
    """Counts the elements of all tensors that come into being, views left out."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.total += tensor.numel()
                self.largest = max(self.largest, tensor.numel())
        return result


def new_elements(length, queries, mask=None, kind="total"):
    query, key, value = random_tensors(1, length, dtype=torch.float32)
    with NewElements() as elements:
        attend((query[:, :, -queries:], key, value), sparsity(block=16), mask, past=length - queries)
    return getattr(elements, kind)


@pytest.mark.parametrize("queries", [1, 40])
def test_a_piece_costs_the_same_after_any_past(queries):
    assert new_elements(1_000, queries) == new_elements(32_000, queries)


def test_a_pass_from_the_start_is_linear():
    """Beyond what the first blocks cost, twice the length makes twice the elements, in none but linear tensors."""
    first, second, third = (new_elements(length, length) for length in (1_600, 3_200, 4_800))
    assert third - second == pytest.approx(second - first, rel=1e-3)
    assert new_elements(12_800, 12_800, kind="largest") <= 12_800 * HEADS * 8 * 3


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("past", [0, 60])
def test_masks_of_four_dimensions_as_generate_makes_them(past, additive):
    some, length, keys = sparsity(), 70, 80
    mask = random_mask("left", 2, length, 3)
    mask[1, 30:33] = 0
    query, key, value = random_tensors(2, keys)
    tensors = (query[:, :, past:length], key, value)
    places = torch.arange(past, length)
    square = (torch.arange(keys) <= places[:, None]) & torch.nn.functional.pad(mask, (0, keys - length)).bool()[
        :, None
    ]
    if additive:
        square = torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)
    expected, _ = attend(tensors, some, mask, past=past)
    actual, _ = attend(tensors, some, square[:, None], past=past)
    torch.testing.assert_close(actual, expected)


def test_masks_that_no_decoder_can_follow():
    tensors = random_tensors(2, 70)
    both_ways = torch.ones(2, 1, 70, 70)
    with pytest.raises(ValueError, match=r"attention_mask hides more than padding.*original_full"):
        one_hidden = both_ways.tril().bool()
        one_hidden[0, 0, 50, 20] = False
        attend(tensors, sparsity(), one_hidden)
    with pytest.raises(ValueError, match="attention_mask hides"):
        attend(tensors, sparsity(), both_ways.bool())
    with pytest.raises(ValueError, match=r"attention_mask has the shape \[2, 70, 70\].*original_full"):
        attend(tensors, sparsity(), both_ways[:, 0])
    with pytest.raises(ValueError, match=r"attention_mask must have the shape \[batch, length\] = \[2, 70\]"):
        attend(tensors, sparsity(), torch.ones(2, 60))
