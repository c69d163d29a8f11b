"""Attention that reads a document some blocks after others, against the definition."""

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigbird_plus import Sparsity
from bigbird_plus.attention.common import chunks, pad_to_blocks
from bigbird_plus.attention.impl import reference
from bigbird_plus.attention.impl.flash_cpu import KeysFirst, Stream, is_streamable

from .test_linear_engines import DTYPES, case, padding_mask

pytestmark = pytest.mark.torch_only


@st.composite
def cases(draw, **strategies):
    strategies = {
        "window": st.sampled_from([1, 3, 5, 7]),
        "num_global": st.integers(0, 4),
        "block": st.sampled_from([1, 2, 3, 8, 16]),
        "extra_blocks": st.integers(1, 9),
        "heads": st.integers(1, 3),
        "head_dim": st.sampled_from([8, 20, 64]),
        "padding": st.sampled_from(["none", "right", "left", "anywhere", "everything"]),
        "seed": st.integers(0, 99),
    } | strategies
    return case(batch=1, **{name: draw(strategy) for name, strategy in strategies.items()})


def stream(query, key, value, pattern, key_mask, *, size, scaling):
    """The context of a document that comes in order, in runs of so many blocks."""
    block = query.shape[2] // pattern.num_blocks
    ends = [slice(0, pattern.first_row * block), slice(pattern.last_row * block, None)]
    outer = [torch.cat([tensor[:, :, end] for end in ends], dim=2) for tensor in (query, key, value)]
    attention = Stream(pattern, *outer, key_mask, scaling=scaling)
    context = torch.empty_like(query)
    most_kept = 0
    for rows in chunks(pattern.first_row, pattern.last_row, size):
        blocks = attention.blocks_before(rows)
        if blocks:
            places = attention.tokens(blocks)
            attention.read(key[:, :, places], value[:, :, places])
        most_kept = max(most_kept, attention.kept[0].shape[1] // block)
        places = attention.tokens(rows)
        context[:, :, places] = attention.attend(rows, query[:, :, places])
    assert most_kept <= size + pattern.window - 1
    outer_context = attention.full_context()
    context[:, :, ends[0]], context[:, :, ends[1]] = outer_context.split(
        [ends[0].stop, outer[0].shape[2] - ends[0].stop], 2
    )
    return context


def keys_first(query, key, value, pattern, key_mask, *, size, scaling):
    """The context of a document whose keys and values come first; rows in runs of so many blocks."""
    read = (pad_to_blocks(tensor, 7, 2).transpose(1, 2) for tensor in (key, value))
    attention, context, rows = KeysFirst(pattern, *read, key_mask, scaling=scaling), torch.empty_like(query), []
    for run in attention.runs(size):
        context[:, :, attention.tokens(run)] = attention.attend(run, query[:, :, attention.tokens(run)])
        rows += run
    assert sorted(rows) == [*range(pattern.num_blocks)]
    return context


@given(case=cases(r=st.just(0), causal=st.booleans()), dtype=st.sampled_from(DTYPES), size=st.integers(1, 9))
@example(case=case(r=3, batch=1, extra_blocks=7), dtype=torch.float32, size=4)
@example(case=case(r=3, batch=1, padding="everything"), dtype=torch.float16, size=2)
@example(case=case(7, 0, 0, batch=1, padding="left"), dtype=torch.float64, size=1)
@example(case=case(1, 3, 0, batch=1, padding="anywhere"), dtype=torch.bfloat16, size=3)
@example(case=case(3, 2, 0, batch=1, padding="anywhere", causal=True, extra_blocks=7), dtype=torch.float32, size=3)
@example(case=case(3, 2, 0, batch=1, causal=True, extra_blocks=-2), dtype=torch.float32, size=3)
@settings(max_examples=150, deadline=None)
def test_in_order(case, dtype, size):
    assert is_streamable(case["pattern"])
    check_against_definition(case, dtype, function=partial(stream, size=size))


RANDOM = {"r": st.integers(0, 3), "training": st.booleans()}
CHOSEN = {"indices": st.lists(st.integers(-12, 30), max_size=4), "num_global": st.just(2)}
ANY = cases(**RANDOM, **CHOSEN) | cases(**RANDOM, causal=st.booleans())


@given(case=ANY, dtype=st.sampled_from(DTYPES), size=st.integers(1, 9))
@example(case=case(r=3, batch=1, extra_blocks=7, training=True), dtype=torch.float32, size=4)
@example(case=case(r=2, batch=1, extra_blocks=7, indices=[0, 3, 4, 9], padding="right"), dtype=torch.float32, size=2)
@example(case=case(r=3, batch=1, extra_blocks=7, causal=True, padding="anywhere"), dtype=torch.float16, size=4)
@example(case=case(r=1, batch=1, extra_blocks=-2, causal=True), dtype=torch.float64, size=1)
@settings(max_examples=100, deadline=None)
def test_keys_first(case, dtype, size):
    check_against_definition(case, dtype, function=partial(keys_first, size=size))


def check_against_definition(case, dtype, *, function):
    """No further from it in float64 than the definition itself in `dtype`, up to a small factor."""
    generator = torch.Generator().manual_seed(case["seed"])
    tensors = [torch.randn(case["shape"], generator=generator).to(dtype) for _ in range(3)]
    mask = padding_mask(case["padding"], 1, case["shape"][2], generator)
    arguments = {"pattern": case["pattern"], "key_mask": mask, "scaling": case["shape"][3] ** -0.5}
    exact = reference.forward(*(tensor.double() for tensor in tensors), **arguments)
    definition = reference.forward(*tensors, **arguments)
    actual = function(*tensors, **arguments)
    roundings = 16 if dtype in (torch.float32, torch.float64) else 4  # as in the tests of sdpa
    allowed = 4 * (definition - exact).abs().max() + roundings * torch.finfo(dtype).eps + 1e-13
    assert actual.dtype is dtype
    assert (actual - exact).abs().max() <= allowed


def test_what_reads_more_than_windows_and_outer_blocks_is_no_stream():
    sparsity = Sparsity(num_attention_heads=2, block_size=4)
    assert is_streamable(sparsity.pattern(20))
    assert is_streamable(Sparsity(2, 4, num_random_blocks=0).causal_pattern(20))
    assert not is_streamable(sparsity.causal_pattern(20))
    assert not is_streamable(sparsity.pattern(20, training=True))
    assert not is_streamable(Sparsity(2, 4, eval_random_blocks=True).pattern(20))
    assert not is_streamable(Sparsity(2, 4, num_random_blocks=0, global_block_indices=[0, 5]).pattern(20))
