"""The block pattern: who reads whom, and how often."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbird_plus import BigBirdConfig, Sparsity
from bigbird_plus.attention.random_blocks import NO_BLOCK

pytestmark = pytest.mark.torch_only


def reads(pattern, row, head=0):
    """The blocks that a row reads, each as often as it does."""
    return np.repeat(np.arange(pattern.num_blocks), pattern.counts[head, row]).tolist()


@st.composite
def sparsities(draw):
    return Sparsity(
        num_attention_heads=draw(st.integers(1, 3)),
        block_size=draw(st.integers(1, 8)),
        num_random_blocks=draw(st.integers(0, 3)),
        num_sliding_window_blocks=draw(st.sampled_from([1, 3, 5, 7])),
        num_global_blocks=draw(st.integers(0, 4)),
        eval_random_blocks=draw(st.booleans()),
    )


def some_pattern(data):
    sparsity = data.draw(sparsities())
    fewest = sparsity.full_attention_length // sparsity.block_size
    num_blocks = data.draw(st.integers(fewest + 1, fewest + 12))
    return sparsity, sparsity.pattern(
        num_blocks, layer_idx=data.draw(st.integers(0, 3)), training=data.draw(st.booleans())
    )


def test_each_row_in_evaluation():
    pattern = Sparsity(num_attention_heads=2).pattern(12)
    everything = list(range(12))
    assert reads(pattern, 0) == reads(pattern, 11) == everything
    assert reads(pattern, 1) == [0, 0, 0, 0, 1, 2, 11]
    assert reads(pattern, 2) == [0, 0, 0, 0, 1, 2, 3, 11]
    assert reads(pattern, 6) == [0, 0, 0, 0, 5, 6, 7, 11]
    assert reads(pattern, 10) == [0, 0, 0, 0, 9, 10, 11]
    assert pattern.counts.shape == (1, 12, 12)


def test_each_row_in_training_reads_its_random_blocks_besides():
    sparsity = Sparsity(num_attention_heads=2)
    pattern = sparsity.pattern(16, layer_idx=1, training=True)
    assert pattern.counts.shape == (2, 16, 16)
    for head in range(2):
        assert reads(pattern, 0, head) == reads(pattern, 15, head) == list(range(16))
        for row in range(1, 15):
            structured = {0, row - 1, row, row + 1, 15}
            random = pattern.random_blocks[head, row].tolist()
            assert len(set(random)) == 3
            assert reads(pattern, row, head) == sorted([*structured, *random])


def test_global_blocks_are_split_between_both_ends():
    def ends(count):
        return Sparsity(num_attention_heads=1, num_global_blocks=count).pattern(20).global_blocks

    assert [ends(count) for count in range(5)] == [[], [0], [0, 19], [0, 1, 19], [0, 1, 18, 19]]


@pytest.mark.parametrize(
    ("window", "row", "expected"), [(1, 5, [5]), (5, 5, [3, 4, 5, 6, 7]), (7, 1, [0, 1, 2, 3, 4])]
)
def test_windows(window, row, expected):
    sparsity = Sparsity(
        num_attention_heads=1, num_sliding_window_blocks=window, num_global_blocks=0, num_random_blocks=0
    )
    assert reads(sparsity.pattern(30), row) == expected


def test_the_longest_input_that_is_read_in_full():
    assert Sparsity(num_attention_heads=12).full_attention_length == 11 * 64
    assert Sparsity(num_attention_heads=12, block_size=16, num_random_blocks=0).full_attention_length == 5 * 16
    wide = Sparsity(num_attention_heads=1, num_sliding_window_blocks=7, num_global_blocks=4, num_random_blocks=2)
    assert wide.full_attention_length == (4 + 7 + 4) * 64


def test_random_blocks_in_evaluation_are_those_of_training_if_asked_for():
    asked = Sparsity(num_attention_heads=3, eval_random_blocks=True)
    np.testing.assert_array_equal(
        asked.pattern(20, layer_idx=2).counts,
        Sparsity(num_attention_heads=3).pattern(20, layer_idx=2, training=True).counts,
    )


def test_other_shapes_read_random_blocks_in_evaluation_too():
    sparsity = Sparsity(num_attention_heads=2, num_sliding_window_blocks=5)
    evaluation, training = (sparsity.pattern(30, training=training) for training in (False, True))
    assert evaluation.first_block_extra == 0
    np.testing.assert_array_equal(evaluation.random_blocks, training.random_blocks)
    assert (evaluation.random_blocks[:, 1:-1] != NO_BLOCK).all()


def test_layers_differ_in_random_blocks_only():
    sparsity = Sparsity(num_attention_heads=2)
    assert sparsity.pattern(20, layer_idx=0) is sparsity.pattern(20, layer_idx=1)
    first, second = (sparsity.pattern(20, layer_idx=layer, training=True) for layer in (0, 1))
    assert (first.random_blocks != second.random_blocks).any()


def test_patterns_are_made_once():
    pattern = Sparsity(num_attention_heads=4).pattern(17, layer_idx=3, training=True)
    assert Sparsity(num_attention_heads=4).pattern(17, layer_idx=3, training=True) is pattern


def test_settings_come_from_the_configuration():
    config = BigBirdConfig(
        hidden_size=24, num_attention_heads=3, block_size=16, num_random_blocks=1, num_global_blocks=4,
        num_sliding_window_blocks=5, eval_random_blocks=True, max_position_embeddings=1000,
    )  # fmt: skip
    assert Sparsity.from_config(config) == Sparsity(3, 16, 1, 5, 4, True, 1000)


@given(st.data())
@settings(max_examples=60)
def test_counts(data):
    sparsity, pattern = some_pattern(data)
    counts, block = pattern.counts, np.arange(pattern.num_blocks)
    inner = np.setdiff1d(block, pattern.global_blocks)
    assert (counts[:, pattern.global_blocks] == 1).all()
    assert (counts[:, :, pattern.global_blocks] >= 1).all()
    near = abs(block[:, None] - block) <= sparsity.num_sliding_window_blocks // 2
    assert (counts[:, near] >= 1).all()
    structured = near.copy()
    structured[:, pattern.global_blocks] = True
    drawn = counts[:, inner].sum(-1) - structured[inner].sum(-1)
    assert (drawn <= sparsity.num_random_blocks).all()
    if sparsity.is_original_shape and pattern.random_blocks is None:
        assert (drawn == sparsity.num_random_blocks).all()
        assert (counts[:, inner, 0] == 1 + sparsity.num_random_blocks).all()


@given(st.data())
@settings(max_examples=60)
def test_lists_and_counts_say_the_same(data):
    _, pattern = some_pattern(data)
    rows = range(pattern.first_row, pattern.last_row)
    expected = np.zeros_like(pattern.counts)
    expected[:, pattern.global_blocks] = 1
    structured = replace(pattern, random_blocks=None)
    for row, lists in zip(rows, pattern.lists(rows.start, rows.stop).numpy(), strict=True):
        assert len(lists) == len(expected)
        expected[:, row, 0] += pattern.first_block_extra
        for head, blocks in enumerate(lists):
            np.add.at(expected[head, row], blocks[blocks != NO_BLOCK], 1)
        blocks = structured.lists(row, row + 1).flatten().tolist()
        blocks = [block for block in blocks if block != NO_BLOCK]
        assert len(set(blocks)) == len(blocks)
    np.testing.assert_array_equal(expected, pattern.counts)
    inner = pattern.inner_rows
    if inner and inner.stop <= pattern.last_row:
        assert NO_BLOCK not in structured.lists(inner.start, inner.stop)


def test_some_of_the_heads():
    pattern = Sparsity(num_attention_heads=4).pattern(20, training=True)
    np.testing.assert_array_equal(pattern.for_heads([0, 3]).counts, pattern.counts[[0, 3]])
    same_for_all = Sparsity(num_attention_heads=4).pattern(20)
    np.testing.assert_array_equal(same_for_all.for_heads([1]).counts, same_for_all.counts)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 0),
        ("block_size", 0),
        ("block_size", 2.0),
        ("num_random_blocks", -1),
        ("num_sliding_window_blocks", 2),
        ("num_sliding_window_blocks", -1),
        ("num_global_blocks", -1),
        ("num_global_blocks", "two"),
    ],
)
def test_wrong_values_are_named(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        Sparsity(**{"num_attention_heads": 2, field: value})
