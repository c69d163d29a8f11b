"""Block-sparse attention on torch's FlexAttention: one kernel, given lists of the blocks that each block reads.

The lists are made of the pattern's blocks: nothing has the size of the scores. Blocks without padding are *full*, and
nothing is masked in them; in the others padded keys are; blocks of nothing but padding are neither read nor read
from. A block that is read c times gets `+ log(c)` on its scores.

One compiled kernel serves all lengths. To that end, what it looks up for a block or a token lies in tables of a fixed
size, and lengths are numbers in tensors: where sizes vary, torch's C++ for the CPU mixes up their names and fails.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask

from ..common import is_tracing, is_transformed
from ..global_tokens import GlobalTokens
from ..pattern import BlockPattern
from ..random_blocks import NO_BLOCK

SMALLEST_BLOCK = 32
"""Tokens that the kernels take at a time, at least (those for gradients; they take no part of these)."""

SMALLEST_HEAD = 16
"""Width of a head, at least."""

SMALLEST_TABLE = 65536
"""Entries of the tables in which the kernels look up blocks and tokens; 16 times as many where they are too few."""

MOST_GRAPHS = 64
"""Kernels kept: with and without padding, gradients, and so on, of each shape of model. torch stops at 8."""


def reason(call) -> str | None:
    """Why it cannot run a call; None if it can.

    Raises:
        ValueError: if the kernels do not take the block size, which is a matter of the configuration.
    """
    if is_tracing() or is_transformed():
        return "it compiles its own graphs, which do not go into others"
    if call.is_causal:
        return "there is no kernel of it for sparse decoders"
    if call.has_global_tokens:
        return "there is no kernel of it for single global tokens"
    if call.dtype is torch.float64:
        return "it does not compute in float64"
    if call.device.type == "cpu" and call.needs_gradients:
        return "on a CPU it has no gradients"
    if call.device.type not in ("cpu", "cuda", "xpu"):
        return f"it does not run on {call.device.type}"
    if call.block_size % SMALLEST_BLOCK:
        raise ValueError(
            f"block_size is {call.block_size}, but flex_attention takes multiples of {SMALLEST_BLOCK} only. For other "
            "sizes choose attn_implementation='sdpa'."
        )
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    key_mask: Tensor | None = None,
    global_tokens: GlobalTokens | None = None,
    *,
    scaling: float,
) -> Tensor:
    """The context of `reference.forward`, from the same arguments; `global_tokens` must be None. The first call of a
    kind compiles, which takes up to a minute."""
    block_size, head_dim = pattern.block_size, query.shape[3]
    if head_dim < SMALLEST_HEAD:
        query, key, value = (
            nn.functional.pad(tensor, (0, SMALLEST_HEAD - head_dim)) for tensor in (query, key, value)
        )
    plan = _make_plan(pattern, query.shape[1], query.device)
    score_mod = None if plan.again is None else _count_again(plan.again, pattern.num_blocks, block_size)
    block_mask = _make_block_mask(plan.reads, key_mask, block_size)
    with torch._dynamo.config.patch(cache_size_limit=MOST_GRAPHS):
        context = _compiled(query.device.type)(query, key, value, score_mod, block_mask, scaling)
    context = context[..., :head_dim]
    return context if key_mask is None else context.masked_fill(~key_mask[:, None, :, None], 0)


@cache
def _compiled(device: str) -> Callable[..., Tensor]:
    """`_attend`, compiled when it is first called. On a GPU torch tries several kernels: the one for gradients that it
    would take untried reads more than 64 tokens at a time."""
    return torch.compile(_attend, fullgraph=True, dynamic=True, options={"max_autotune": device != "cpu"})


def _attend(query, key, value, score_mod, block_mask, scaling):
    tile = 64 if block_mask.BLOCK_SIZE[0] % 64 == 0 else SMALLEST_BLOCK
    tiles = {"BLOCK_M": tile, "BLOCK_N": tile}  # divide the blocks, which torch's own choice need not
    return flex_attention(query, key, value, score_mod, block_mask, scale=scaling, kernel_options=tiles)


class _Plan(NamedTuple):
    """A pattern as tensors.

    reads: `bool`, `[1, heads or 1, m, m]`: whether block i reads block j.
    again: what rows read again, in places: of each, the block that a row of a head reads, `int32`, and what its scores
        get for it, `float32`, both tables of `[heads, m]`; None if there is nothing.
    """

    reads: Tensor
    again: tuple[tuple[Tensor, Tensor], ...] | None


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the same tensors can be saved for a backward pass later
def _make_plan(pattern: BlockPattern, heads: int, device: torch.device) -> _Plan:
    num_blocks, rows = pattern.num_blocks, slice(pattern.first_row, pattern.last_row)
    lists = pattern.lists(rows.start, rows.stop).transpose(0, 1)
    num_structured = len(pattern.outer_blocks) + pattern.window
    reads = torch.zeros(len(lists), num_blocks, num_blocks + 1, dtype=torch.bool)
    reads[:, rows].scatter_(2, lists.masked_fill(lists == NO_BLOCK, num_blocks), True)
    reads[:, pattern.global_blocks] = True
    reads[:, :, pattern.global_blocks] = True

    again = [_again(lists, place) for place in range(num_structured, lists.shape[2])]
    if pattern.first_block_extra:
        first = torch.zeros_like(lists[..., 0])
        again.append((first, torch.full(first.shape, float(pattern.first_block_extra)).log1p()))
    if not any(gain.any() for _, gain in again):
        return _Plan(reads[None, ..., :num_blocks].to(device), None)

    def of_all_rows(tensor, dtype):
        table = torch.zeros(heads, num_blocks, dtype=dtype)
        table[:, rows] = tensor.to(dtype)
        return _as_table(table.to(device))

    tables = tuple((of_all_rows(block, torch.int32), of_all_rows(gain, torch.float32)) for block, gain in again)
    return _Plan(reads[None, ..., :num_blocks].to(device), tables)


def _again(lists: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """The blocks that rows read in one place of their lists, and what the scores of a block get for it if it already
    stands c times before that place: `log(c + 1) - log(c)`."""
    block = lists[..., place]
    before = (lists[..., :place] == block[..., None]).sum(-1)
    return block, torch.where((before > 0) & (block != NO_BLOCK), torch.log1p(1 / before.clamp(min=1)), 0)


def _count_again(again, num_blocks: int, block_size: int) -> Callable[..., Tensor]:
    """The function that adds to the scores of what is read again."""
    device = again[0][0].device
    blocks, tokens = (torch.tensor(size, device=device) for size in (num_blocks, block_size))

    def score_mod(score, batch, head, query_place, key_place):
        row = head * blocks + query_place // tokens
        for block, gain in again:
            score = score + torch.where(_look_up(block, row) == key_place // tokens, _look_up(gain, row), 0.0)
        return score

    return score_mod


def _make_block_mask(reads: Tensor, key_mask: Tensor | None, block_size: int) -> BlockMask:
    """`reads` as lists, without what is padding."""
    num_blocks = reads.shape[-1]
    full_lists: list[Tensor | None]
    if key_mask is None:
        full_lists, mask_mod = [None] * 4, noop_mask
    else:
        blocks = key_mask.unflatten(1, (num_blocks, block_size))
        has_tokens, is_full = blocks.any(-1)[:, None], blocks.all(-1)[:, None]
        reads = reads & has_tokens[..., None] & has_tokens[..., None, :]
        full = reads & is_full[..., None, :]
        reads = reads & ~full
        full_lists = [*_to_lists(full), *_to_lists(full.mT)]
        mask_mod = _hide_padding(key_mask)
    names = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")
    lists: dict[str, Any] = dict(zip(names, [*_to_lists(reads), *_to_lists(reads.mT)], strict=True))
    lists.update(zip((f"full_{name}" for name in names), full_lists, strict=True))
    length = num_blocks * block_size
    return BlockMask((length, length), **lists, BLOCK_SIZE=(block_size, block_size), mask_mod=mask_mod)


def _to_lists(reads: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row reads, `int32`, `[..., m]`, and their numbers, `[..., m, m]`, those not read last."""
    counts = reads.sum(-1, dtype=torch.int32)
    order = torch.argsort(reads.to(torch.uint8), dim=-1, descending=True, stable=True).to(torch.int32).contiguous()
    torch._dynamo.mark_dynamic(counts, 2)  # even where there are as many blocks as, say, tokens in a block
    torch._dynamo.mark_dynamic(order, (2, 3))
    return counts, order


def _hide_padding(key_mask: Tensor) -> Callable[..., Tensor]:
    """The function that tells which keys are read."""
    is_real = _as_table(key_mask)
    length = torch.tensor(key_mask.shape[1], device=key_mask.device)

    def mask_mod(batch, head, query_place, key_place):
        return _look_up(is_real, batch * length + key_place)

    return mask_mod


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """An entry of a table, any for an index that is out of bounds: torch tries kernels with random numbers in the
    place of what they are given, lengths among them."""
    return table[index.clamp(0, table.shape[0] - 1)]


def _as_table(tensor: Tensor) -> Tensor:
    """`tensor` in one dimension, filled up to one of few sizes."""
    size = SMALLEST_TABLE
    while size < tensor.numel():
        size *= 16
    table = nn.functional.pad(tensor.flatten(), (0, size - tensor.numel()))
    torch._dynamo.mark_static(table)
    return table
