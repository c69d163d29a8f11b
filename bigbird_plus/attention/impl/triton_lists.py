"""The blocks that each block reads, and those that it is read by, as lists for the Triton kernels to walk over."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..caches import cached_up_to
from ..common import keep_on_device
from ..pattern import BlockPattern
from ..random_blocks import NO_BLOCK

MOST_BYTES = 128 * 2**20
"""Of the lists that are kept on GPUs: those of twelve layers with random blocks for eighty lengths of 4,096 tokens."""

ALIGNMENT = 4
"""Numbers: Triton compiles other kernels for tensors that do not begin at a multiple of 16 bytes."""


class WalkLists(NamedTuple):
    """For each block those that it reads, or those that it is read by, in ascending order.

    rows: `int32`: the blocks in the order in which programs take them. Each of the first `num_long`, whose lists have
        all blocks, stands there `segments` times, once for each part of its list.
    num_long, segments: see there.
    starts: `int32`, `[heads or 1, blocks + 1]`: where the list of each block begins in the next two, and ends.
    blocks: `int32`: all lists, one after another.
    gains: `float32`: for each of them the logarithm, to base 2, of how many times it is read.
    """

    rows: Tensor
    num_long: int
    segments: int
    starts: Tensor
    blocks: Tensor
    gains: Tensor

    @property
    def num_blocks(self) -> int:
        """Blocks of the input."""
        return self.starts.shape[1] - 1

    @property
    def tensors(self) -> list[Tensor]:
        """Those that it is made of."""
        return [self.rows, self.starts, self.blocks, self.gains]

    def with_tensors(self, tensors: list[Tensor]) -> "WalkLists":
        """The same of others."""
        rows, starts, blocks, gains = tensors
        return self._replace(rows=rows, starts=starts, blocks=blocks, gains=gains)

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def num_shared(self) -> int:
        """How many of the `rows` are parts of long lists."""
        return self.num_long * self.segments if self.segments > 1 else 0


@cached_up_to(MOST_BYTES, lambda both: sum(lists.num_bytes for lists in both))
def make_lists(
    pattern: BlockPattern, segments: int, device: torch.device, extra_blocks: int = 0
) -> tuple[WalkLists, WalkLists]:
    """What blocks read, and what they are read by, with so many more global blocks behind those of the pattern. Made
    once for patterns that say the same, as long as a bounded cache holds it."""
    if extra_blocks:
        pattern = _with_more_blocks(pattern, extra_blocks)
    head, row, block, count = _count_readings(pattern)
    both = (
        _as_lists(head, row, block, count, pattern=pattern, segments=segments),
        _as_lists(head, block, row, count, pattern=pattern, segments=segments),
    )
    tensors = iter(_in_one_copy([tensor for lists in both for tensor in lists.tensors], device))
    reads, read_by = (lists.with_tensors([next(tensors) for _ in lists.tensors]) for lists in both)
    return reads, read_by


def _with_more_blocks(pattern: BlockPattern, count: int) -> BlockPattern:
    """With so many more global blocks at its end."""
    random = pattern.random_blocks
    return replace(
        pattern,
        num_blocks=pattern.num_blocks + count,
        num_trailing=pattern.num_trailing + count,
        random_blocks=None
        if random is None
        else np.pad(random, ((0, 0), (0, count), (0, 0)), constant_values=NO_BLOCK),
    )


def _count_readings(pattern: BlockPattern) -> tuple[np.ndarray, ...]:
    """What is not zero in `pattern.counts`: head, block that reads, block that is read, how many times; without an
    array of all pairs of blocks, for long documents have many."""
    num_blocks, random = pattern.num_blocks, pattern.random_blocks
    heads = np.arange(1 if random is None else len(random))
    pairs = [np.add.outer(heads * num_blocks**2, _structured_readings(pattern)).ravel()]
    if random is not None:
        first, last = _sparse_rows(pattern)
        blocks = random[:, first:last]
        own = (heads[:, None, None] * num_blocks + np.arange(first, last)[:, None]) * num_blocks + blocks
        pairs.append(own[blocks != NO_BLOCK])
    readings, counts = np.unique(np.concatenate(pairs), return_counts=True)
    head, row, block = np.unravel_index(readings, (len(heads), num_blocks, num_blocks))
    reads_all = np.isin(row, _long_rows(pattern))
    counts[reads_all] = 1
    counts[~reads_all & (block == 0)] += pattern.first_block_extra
    return head, row, block, counts


def _structured_readings(pattern: BlockPattern) -> np.ndarray:
    """What is read beside random blocks, each pair once: `row * num_blocks + block`."""
    first, last = _sparse_rows(pattern)
    every, full_rows = np.arange(pattern.num_blocks), np.array(pattern.full_rows, dtype=np.int64)
    lists = replace(pattern, random_blocks=None).lists(first, last)[:, 0].numpy()
    lists = np.concatenate((lists, np.tile(np.array(pattern.global_blocks, dtype=np.int64), (len(lists), 1))), axis=1)
    row, place = np.nonzero(lists != NO_BLOCK)
    full_row, full_block = np.repeat(full_rows, len(every)), np.tile(every, len(full_rows))
    if pattern.is_causal:
        full_row, full_block = full_row[full_block <= full_row], full_block[full_block <= full_row]
    rows = np.concatenate((row + first, full_row))
    return np.unique(rows * pattern.num_blocks + np.concatenate((lists[row, place], full_block)))


def _long_rows(pattern: BlockPattern) -> list[int]:
    """The blocks whose lists have all blocks; a decoder has none."""
    return [] if pattern.is_causal else pattern.global_blocks


def _sparse_rows(pattern: BlockPattern) -> tuple[int, int]:
    """The first of the blocks that do not read everything, and the end of them."""
    return pattern.first_row, max(pattern.last_row, pattern.first_row)


def _as_lists(head, row, block, count, *, pattern: BlockPattern, segments: int) -> WalkLists:
    """On the CPU."""
    order = np.lexsort((block, row, head))
    shape = (head.max() + 1, pattern.num_blocks)
    ends = np.cumsum(np.bincount(head * shape[1] + row, minlength=shape[0] * shape[1])).reshape(shape)
    starts = np.concatenate((np.append(0, ends[:-1, -1])[:, None], ends), axis=1)
    long_rows = _long_rows(pattern)
    others = np.setdiff1d(np.arange(shape[1]), long_rows)
    return WalkLists(
        rows=_as_tensor(np.concatenate((np.repeat(long_rows, segments), others)), np.int32),
        num_long=len(long_rows),
        segments=segments,
        starts=_as_tensor(starts, np.int32),
        blocks=_as_tensor(block[order], np.int32),
        gains=_as_tensor(np.log2(count[order]), np.float32),
    )


def _as_tensor(array: np.ndarray, dtype) -> Tensor:
    return torch.from_numpy(array.astype(dtype))


def _in_one_copy(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of 32 bits on a device."""
    sizes = [-(-tensor.numel() // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    buffer = torch.zeros(sum(sizes), dtype=torch.int32)
    for tensor, place in zip(tensors, buffer.split(sizes), strict=True):
        place[: tensor.numel()] = tensor.flatten().view(torch.int32)
    places = keep_on_device(buffer, device).split(sizes)
    return [
        place[: tensor.numel()].view(tensor.dtype).view(tensor.shape)
        for tensor, place in zip(tensors, places, strict=True)
    ]
