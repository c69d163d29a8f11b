"""The random blocks of BigBird, drawn from private seeded generators: the same arguments give the same blocks.

The draws, and their order, are those of the published implementations, so that training sees the blocks it would see
there. Nothing here touches NumPy's global generator.

A model can have random blocks of its own instead, written down in its configuration.
"""

import reprlib
import threading
from functools import lru_cache

import numpy as np

PAPER_PLAN_LENGTHS = (1024, 3072, 4096)
PAPER_PLAN_REACH = 1024
"""The paper draws random blocks from the first 1,024 tokens only."""

NO_BLOCK = -1


def draw_random_blocks(
    *, num_heads, num_blocks, block_size, num_random_blocks, max_position_embeddings, layer_idx
) -> np.ndarray:
    """The random blocks of BigBird's own shape (a window of three blocks, a global block at either end).

    Lengths of 1,024, 3,072 and 4,096 tokens use the plan of the paper, others the two-stage plan that came later.

    Returns:
        `int64` array `[num_heads, num_blocks, num_random_blocks]`: the blocks that each block reads at random, filled
        up with `NO_BLOCK` where there are fewer candidates. The rows of the first and the last block, which read
        everything anyway, hold `NO_BLOCK` only.
    """
    generator = np.random.RandomState(layer_idx)
    plan = np.full((num_heads, num_blocks, num_random_blocks), NO_BLOCK, dtype=np.int64)
    if num_random_blocks == 0:
        return plan
    if num_blocks * block_size in PAPER_PLAN_LENGTHS:
        _draw_paper_plan(plan, generator, block_size, max_position_embeddings)
    else:
        _draw_two_stage_plan(plan, generator)
    return plan


def draw_uniform_blocks(*, num_heads, num_random_blocks, layer_idx, eligible) -> np.ndarray:
    """Random blocks of any other shape: for each row, `num_random_blocks` distinct ones of those eligible.

    Args:
        eligible: `bool` array `[num_blocks, num_blocks]`: whether row i may draw block j.

    Returns:
        `int64` array `[num_heads, num_blocks, num_random_blocks]`, filled up with `NO_BLOCK`.
    """
    generator = np.random.RandomState(layer_idx)
    plan = np.full((num_heads, len(eligible), num_random_blocks), NO_BLOCK, dtype=np.int64)
    for row, may_draw in enumerate(eligible):
        candidates = np.flatnonzero(may_draw)
        for head in range(num_heads):
            _fill(plan[head, row], generator.permutation(candidates))
    return plan


def write_random_blocks(reads: np.ndarray) -> str:
    """What `read_random_blocks` reads, of a `bool` array `[heads, rows, rows]`: whether a row reads that block."""
    rows = [[" ".join(map(str, np.flatnonzero(row))) for row in head] for head in reads]
    return ";".join(",".join(head) for head in rows)


@lru_cache(maxsize=16)
def read_random_blocks(text: str, num_heads: int, num_random_blocks: int) -> np.ndarray:
    """The random blocks that a configuration names: numbers between spaces, rows between commas, heads between
    semicolons.

    Returns:
        `int64` array `[num_heads, rows, num_random_blocks]`, filled up with `NO_BLOCK`.

    Raises:
        ValueError: if there are others than `num_heads` heads of equally many rows, or in a row more than
            `num_random_blocks` blocks, one twice, or one that is no row.
    """
    try:
        heads = [[[int(block) for block in row.split()] for row in head.split(",")] for head in text.split(";")]
    except ValueError:
        heads = []
    rows = [row for head in heads for row in head]
    num_rows = len(rows) // num_heads
    is_plan = len(heads) == num_heads and all(len(head) == num_rows for head in heads)
    if not is_plan or not all(_is_row(row, num_random_blocks, num_rows) for row in rows):
        raise ValueError(
            f"random_blocks must name up to num_random_blocks ({num_random_blocks}) different blocks in each row (as "
            f"'3 7'), with a row for each block (as '3 7,0,') and {num_heads} heads of them (between ';'; one for all "
            f"unless different_layout_per_head), but is {reprlib.repr(text)}."
        )
    plan = np.full((num_heads, num_rows, num_random_blocks), NO_BLOCK, dtype=np.int64)
    for slots, row in zip(plan.reshape(len(rows), num_random_blocks), rows, strict=True):
        _fill(slots, row)
    return plan


def _is_row(row: list[int], num_random_blocks: int, num_rows: int) -> bool:
    return len(set(row)) == len(row) <= num_random_blocks and all(0 <= block < num_rows for block in row)


def repeat_random_blocks(plan: np.ndarray, num_blocks: int) -> np.ndarray:
    """The plan `[heads or 1, rows, random]` for `num_blocks` blocks: its beginning, or the plan and behind it the same
    again, which reads as many blocks further on."""
    rows = np.arange(num_blocks)
    moved = plan[:, rows % plan.shape[1]]
    moved = np.where(moved == NO_BLOCK, num_blocks, moved + (rows - rows % plan.shape[1])[:, None])
    return np.where(moved < num_blocks, moved, NO_BLOCK)


class CausalPlan:
    """The random blocks of a decoder's layer, drawn row after row, so that a longer plan goes on where a shorter one
    ends. Safe to use from several threads.

    Args:
        num_heads: heads, each of which draws its own.
        num_random_blocks: distinct blocks that each row draws.
        first_row: the first row that draws.
        num_leading: blocks at the beginning that are not drawn.
        window: as many blocks up to a row's own, itself included, are not drawn either.
        layer_idx: seed of the generator.
    """

    def __init__(self, *, num_heads, num_random_blocks, first_row, num_leading, window, layer_idx):
        self._generator = np.random.RandomState(layer_idx)
        self._lock = threading.Lock()
        self._num_leading, self._window = num_leading, window
        self._blocks = np.full((num_heads, first_row, num_random_blocks), NO_BLOCK, dtype=np.int64)

    def blocks(self, num_blocks: int) -> np.ndarray:
        """`int64` array `[num_heads, num_blocks, num_random_blocks]`; rows before the first hold `NO_BLOCK` only."""
        with self._lock:
            drawn = self._blocks.shape[1]
            if drawn < num_blocks:
                more = [self._draw_row(row) for row in range(drawn, max(num_blocks, 2 * drawn))]
                self._blocks = np.concatenate((self._blocks, np.stack(more, axis=1)), axis=1)
            return self._blocks[:, :num_blocks]

    def _draw_row(self, row):
        heads, _, count = self._blocks.shape
        candidates = np.arange(self._num_leading, row - self._window + 1)
        return np.stack([self._generator.permutation(candidates)[:count] for _ in range(heads)])


def _draw_paper_plan(plan, generator, block_size, max_position_embeddings):
    """Heads outer, rows inner. Drawn for the longest input the model takes, so every length cuts the same plan."""
    num_blocks = plan.shape[1]
    plan_blocks = max(max_position_embeddings // block_size, num_blocks)
    last = plan_blocks - 1
    if 2 * block_size < PAPER_PLAN_REACH:
        last = PAPER_PLAN_REACH // block_size - 1
    for head_plan in plan:
        for row in range(1, plan_blocks - 1):
            drawn = generator.permutation(_paper_candidates(row, plan_blocks, last))
            if row < num_blocks - 1:
                _fill(head_plan[row], drawn[: plan.shape[2]], num_blocks)


def _paper_candidates(row, plan_blocks, last):
    """The blocks that row `row` may draw. Some of them can be in the row's window: those are then read twice."""
    inner = np.arange(1, plan_blocks - 1)
    if row in (1, 2):
        return inner[row + 1 : last]
    if row >= plan_blocks - 3 or row - 2 > last:
        return inner[:last]
    if row + 1 == last:
        return inner[: row - 2]
    return np.concatenate((inner[: row - 2], inner[row + 1 : last]))


def _draw_two_stage_plan(plan, generator):
    """Rows outer, heads inner, one permutation each. The last row is drawn as well, and not used."""
    num_heads, num_blocks, num_random_blocks = plan.shape
    reach = 2 * num_random_blocks + 5
    for row in range(1, num_blocks):
        excluded = {0, reach - 1, row - 1, row, row + 1}
        if row == 1:
            excluded.add(reach - 2)
        if row == reach - 2:
            excluded.add(1)
        for head in range(num_heads):
            drawn = generator.permutation(np.arange(reach))
            if row < num_blocks - 1:
                _fill(plan[head, row], drawn[[block not in excluded for block in drawn]])


def _fill(slots, blocks, num_blocks=None):
    """Writes as many of `blocks` into `slots` as there are and fit, leaving out those beyond the input."""
    if num_blocks is not None:
        blocks = blocks[blocks < num_blocks]
    blocks = blocks[: len(slots)]
    slots[: len(blocks)] = blocks
