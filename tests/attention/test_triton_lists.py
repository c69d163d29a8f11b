"""The lists of blocks that kernels walk over, against the pattern that they are made of."""

import random
from unittest import mock

import numpy as np
import pytest
import torch

from bigbird_plus import Sparsity
from bigbird_plus.attention import pattern as patterns
from bigbird_plus.attention.caches import cached_up_to
from bigbird_plus.attention.impl import triton_lists
from bigbird_plus.attention.impl.triton_lists import make_lists

pytestmark = pytest.mark.torch_only

PATTERNS = {
    "evaluation": Sparsity(3, num_random_blocks=2).pattern(12),
    "training": Sparsity(3, num_random_blocks=2).pattern(12, training=True),
    "one layout": Sparsity(3, different_layout_per_head=False).pattern(14, training=True),
    "wide": Sparsity(2, num_sliding_window_blocks=5, num_global_blocks=3).pattern(16),
    "by index": Sparsity(2, num_random_blocks=1, global_block_indices=(0, 4, -3)).pattern(13),
    "no global blocks": Sparsity(2, num_random_blocks=1, num_global_blocks=0).pattern(9),
    "decoder": Sparsity(2, num_random_blocks=1).causal_pattern(13),
    "short decoder": Sparsity(2, num_random_blocks=1).causal_pattern(5),
}


def counts_of(lists):
    """What the lists say: `[heads or 1, blocks, blocks]`."""
    starts, blocks, gains = (tensor.numpy() for tensor in (lists.starts, lists.blocks, lists.gains))
    counts = np.zeros((len(starts), lists.num_blocks, lists.num_blocks), dtype=np.int64)
    for head in range(len(starts)):
        for row in range(lists.num_blocks):
            own = slice(starts[head, row], starts[head, row + 1])
            assert (np.diff(blocks[own]) > 0).all()
            counts[head, row, blocks[own]] = np.rint(2.0 ** gains[own])
    return counts


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_lists_are_those_of_the_pattern(pattern):
    reads, read_by = make_lists(pattern, 3, torch.device("cpu"))
    np.testing.assert_array_equal(counts_of(reads), pattern.counts)
    np.testing.assert_array_equal(counts_of(read_by), pattern.counts.transpose(0, 2, 1))


@pytest.mark.parametrize("segments", [1, 3])
def test_long_lists_come_first_and_every_block_has_its_turn(segments):
    reads, _ = make_lists(PATTERNS["by index"], segments, torch.device("cpu"))
    assert reads.rows.tolist() == [
        *[block for block in (0, 4, 10) for _ in range(segments)],
        *[block for block in range(13) if block not in (0, 4, 10)],
    ]
    assert reads.num_long == 3
    assert reads.num_shared == (9 if segments == 3 else 0)


def test_lists_are_made_once_for_patterns_that_say_the_same():
    pattern = Sparsity(2, num_random_blocks=1).pattern(14, training=True)
    lists = make_lists(pattern, 1, torch.device("cpu"))
    for heads, is_same in (([0, 1], True), ([1], False)):
        again = make_lists(pattern.for_heads(heads), 1, torch.device("cpu"))
        assert (again is lists) == is_same
        assert make_lists(pattern.for_heads(heads), 1, torch.device("cpu")) is again
    short = pattern.cut(0, 9)
    assert short is not pattern.cut(0, 9)
    assert make_lists(short, 1, torch.device("cpu")) is make_lists(pattern.cut(0, 9), 1, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["training", "evaluation", "decoder"])
def test_training_over_many_lengths_makes_each_list_once(kind):
    """Twelve layers, batches of 12 to 36 blocks in any order."""
    sparsity, lengths = Sparsity(2, block_size=32, num_random_blocks=1), [*range(12, 37)]
    order = random.Random(0).sample(2 * lengths, 50)
    draw = mock.patch.object(patterns, "_draw", wraps=patterns._draw)
    count = mock.patch.object(triton_lists, "_count_readings", wraps=triton_lists._count_readings)
    with draw as draws, count as counts:
        for length in order:
            for layer in range(12):
                if kind == "decoder":
                    pattern = sparsity.causal_pattern(length, layer_idx=layer)
                else:
                    pattern = sparsity.pattern(length, layer_idx=layer, training=kind == "training")
                make_lists(pattern, 1, torch.device("cpu"))
    assert counts.call_count == (25 if kind == "evaluation" else 300)
    assert draws.call_count == (300 if kind == "training" else 0)


def test_more_global_blocks_at_the_end():
    pattern = PATTERNS["training"]
    reads, read_by = make_lists(pattern, 1, torch.device("cpu"), 2)
    expected = np.pad(pattern.counts, ((0, 0), (0, 2), (0, 2)), constant_values=1)
    np.testing.assert_array_equal(counts_of(reads), expected)
    np.testing.assert_array_equal(counts_of(read_by), expected.transpose(0, 2, 1))


def test_caches_are_bounded_by_bytes():
    made = []

    @cached_up_to(10, len)
    def make(size):
        made.append(size)
        return bytes(size)

    for size in (4, 5, 4, 3):  # the one of 5 was asked for before that of 4
        make(size)
    assert made == [4, 5, 3]
    make(4)
    make(5)
    assert made == [4, 5, 3, 5]
    assert make(20) is make(20)  # the latest, however large
    make(4)
    assert made == [4, 5, 3, 5, 20, 4]
