"""The lists of blocks that kernels walk over, against the pattern that they are made of."""

import numpy as np
import pytest
import torch

from bigbird_plus import Sparsity
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


def test_lists_are_made_once():
    pattern = Sparsity(2).pattern(14)
    assert make_lists(pattern, 1, torch.device("cpu")) is make_lists(pattern, 1, torch.device("cpu"))
