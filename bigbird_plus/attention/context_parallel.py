"""Exact attention over a document that several processes share, each holding some of its blocks in a row.

A process reads its blocks as an engine reads any document: one that consists of its own blocks, between those that
they read besides. These are fetched, each for those heads alone that read it: the global blocks, the window's other
half at either end, and the random blocks. What reads everything, the global rows, every process computes over its own
keys; their owner merges the parts by their log-sum-exps.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .block_lists import blocks_of
from .common import additive_mask, causal_mask, chunks, count_blocks, merge, pad_to_blocks, per_chunk, score_dtype
from .engines import Engine
from .global_tokens import GlobalTokens
from .pattern import BlockPattern
from .processes import Processes
from .random_blocks import NO_BLOCK


class Shards(NamedTuple):
    """Which process holds what: from `bounds[rank]` to `bounds[rank + 1]` so many blocks, and the last one the extra
    global tokens, too. `rank` is this process."""

    bounds: tuple[int, ...]
    rank: int

    @classmethod
    def even(cls, num_blocks: int, processes: Processes) -> "Shards":
        """As even as whole blocks allow."""
        size = processes.size
        return cls(tuple(-(-num_blocks * rank // size) for rank in range(size + 1)), processes.rank)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self.bounds) - 1

    @property
    def own(self) -> range:
        """The blocks of this process."""
        return self.blocks(self.rank)

    def blocks(self, rank: int) -> range:
        """The blocks of a process."""
        return range(self.bounds[rank], self.bounds[rank + 1])

    def of_document(self, first: int, count: int) -> "Shards":
        """Who holds what of `count` blocks from `first` on, counted from there."""
        return Shards(tuple(min(max(bound - first, 0), count) for bound in self.bounds), self.rank)

    @property
    def holders(self) -> int:
        """How many processes have a block."""
        return sum(len(self.blocks(rank)) > 0 for rank in range(self.size))

    def owners(self, blocks: np.ndarray) -> np.ndarray:
        """The ranks that hold the blocks."""
        return np.searchsorted(self.bounds, blocks, side="right").clip(1, self.size) - 1


# ---------------------------------------------------------------------------------------------------------------------
# What a process reads, as a document of its own
# ---------------------------------------------------------------------------------------------------------------------


class Excerpt(NamedTuple):
    """What the rows of a process that do not read everything read, in the order of the document.

    slots: `int64`, `[slots]`: which block each block of the excerpt is.
    rows: which slots are those rows.
    pattern: which slot reads which; right for `rows` only.
    wanted: `bool`, `[heads or 1, slots]`: of which slots heads read anything that is to be fetched.
    """

    slots: np.ndarray
    rows: range
    pattern: BlockPattern
    wanted: np.ndarray

    def places_of(self, blocks: np.ndarray) -> np.ndarray:
        """The slots of blocks, which are in the excerpt or `NO_BLOCK`."""
        places = np.full(max(self.slots.max(), blocks.max(initial=0)) + 2, NO_BLOCK)
        places[self.slots] = np.arange(len(self.slots))
        return places[blocks]


def make_excerpt(pattern: BlockPattern, own: range, shared: tuple[int, ...]) -> Excerpt | None:
    """The excerpt of a process that holds the blocks `own`; None if all of them read everything. `shared` are blocks
    that all rows of all heads may read, besides the outer ones."""
    first, last = max(own.start, pattern.first_row), min(own.stop, pattern.last_row)
    if first >= last:
        return None
    before = range(max(first - pattern.before, pattern.num_leading), first)
    behind = range(last, min(last + pattern.after, pattern.last_row))
    near = [*range(pattern.num_leading), *before, *range(first, last), *behind]
    near += range(pattern.last_row, pattern.num_blocks)
    random = _random_rows(pattern, first, last)
    far = sorted({*shared, *np.unique(random).tolist()} - {*near, NO_BLOCK})
    # Blocks from afar stand where no window ends too early to reach them.
    is_last = len(behind) < pattern.after or pattern.is_causal
    inner = [*far, *before, *range(first, last), *behind] if is_last else [*before, *range(first, last), *behind, *far]
    slots = np.array([*range(pattern.num_leading), *inner, *range(pattern.last_row, pattern.num_blocks)])
    start = int(np.flatnonzero(slots == first)[0])
    rows = range(start, start + last - first)
    wanted = np.ones((len(random), len(slots)), dtype=bool)
    is_far = np.isin(slots, far) & ~np.isin(slots, shared)
    for head, blocks in enumerate(random):
        wanted[head, is_far] = np.isin(slots[is_far], blocks)
    wanted[:, rows] = False
    excerpt = Excerpt(slots, rows, pattern, wanted)
    return excerpt._replace(pattern=_pattern_of(excerpt, pattern, random))


def _random_rows(pattern: BlockPattern, first: int, last: int) -> np.ndarray:
    """`[heads or 1, rows, random]`."""
    if pattern.random_blocks is None:
        return np.empty((1, last - first, 0), dtype=np.int64)
    return np.asarray(pattern.random_blocks)[:, first:last]


def _pattern_of(excerpt: Excerpt, pattern: BlockPattern, random: np.ndarray) -> BlockPattern:
    slots, rows, _, _ = excerpt
    random_blocks = None
    if random.size:
        random_blocks = np.full((len(random), len(slots), random.shape[2]), NO_BLOCK)
        random_blocks[:, rows] = excerpt.places_of(random)
    return replace(
        pattern,
        num_blocks=len(slots),
        middle_blocks=tuple(excerpt.places_of(np.array(pattern.middle_blocks, dtype=np.int64)).tolist()),
        num_full=pattern.num_leading + pattern.before if pattern.is_causal else 0,
        random_blocks=random_blocks,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is sent
# ---------------------------------------------------------------------------------------------------------------------


class Fetch(NamedTuple):
    """Which blocks of which heads are sent and received.

    heads, blocks: `int64`, `[pairs]`: what is sent; blocks are counted from the first one of this process.
    sent, received: how many pairs go to, and come from, each process.
    places: `int64`, `[pairs]`: where what comes stands among `shape`, flattened.
    shape: heads and blocks of what has been fetched.
    """

    heads: Tensor
    blocks: Tensor
    sent: list[int]
    received: list[int]
    places: Tensor
    shape: tuple[int, int]

    def of(self, tensors: list[Tensor], processes: Processes) -> Tensor:
        """From own `[batch, heads, blocks, block, dim]` those fetched, `[tensors, batch, heads, blocks, block, dim]`,
        zeros where a head has fetched nothing."""
        heads, blocks = self.heads.to(tensors[0].device), self.blocks.to(tensors[0].device)
        pairs = torch.stack([tensor[:, heads, blocks] for tensor in tensors]).movedim(2, 0)
        pairs = processes.exchange(pairs, self.sent, self.received)
        fetched = pairs.new_zeros(self.shape[0] * self.shape[1], *pairs.shape[1:])
        fetched = fetched.index_copy(0, self.places.to(pairs.device), pairs)
        return fetched.unflatten(0, self.shape).permute(2, 3, 0, 1, 4, 5)


def make_fetch(shards: Shards, wanted: list[tuple[np.ndarray, np.ndarray]]) -> Fetch:
    """`wanted`, of each process: some blocks, and of which of them a head wants anything, `[heads, blocks]`."""
    heads, blocks, sent = [], [], []
    for asked, wants in wanted:
        head, place = (wants & (shards.owners(asked) == shards.rank)).nonzero()
        heads.append(head)
        blocks.append(asked[place] - shards.own.start)
        sent.append(len(head))
    asked, wants = wanted[shards.rank]
    found = [(wants & (shards.owners(asked) == rank)).nonzero() for rank in range(shards.size)]
    places = np.concatenate([head * len(asked) + place for head, place in found])
    own_heads, own_blocks = (torch.from_numpy(np.concatenate(arrays)) for arrays in (heads, blocks))
    return Fetch(own_heads, own_blocks, sent, [len(head) for head, _ in found], torch.from_numpy(places), wants.shape)


class Exchanges(NamedTuple):
    """What a layer exchanges.

    excerpt: what this process reads; None if nothing but what is read in full.
    keys: how keys and values are fetched for it: those of `excerpt.wanted`, and extra tokens as blocks behind them.
    full: the blocks whose tokens may read everything.
    queries: how those are fetched.
    """

    excerpt: Excerpt | None
    keys: Fetch
    full: np.ndarray
    queries: Fetch


@lru_cache(maxsize=256)
def full_pattern(num_blocks: int, block_size: int, is_causal: bool) -> BlockPattern:
    """All blocks read everything."""
    pattern = BlockPattern(num_blocks=num_blocks, block_size=block_size, window=1, num_leading=num_blocks)
    return replace(pattern, num_full=num_blocks, is_causal=True) if is_causal else pattern


@lru_cache(maxsize=256)
def plan_exchanges(
    pattern: BlockPattern, shards: Shards, heads: int, shared: tuple[int, ...], extra_blocks: int
) -> Exchanges:
    """What a layer of so many heads exchanges. `shared` are the blocks in which single global tokens stand, extra ones
    fill so many blocks behind the last one."""
    shared = tuple(sorted({*shared, *pattern.middle_blocks}))
    extra = np.arange(pattern.num_blocks, pattern.num_blocks + extra_blocks)
    excerpts = [make_excerpt(pattern, shards.blocks(rank), shared) for rank in range(shards.size)]
    wanted = []
    for excerpt in excerpts:
        if excerpt is None:
            wanted.append((np.empty(0, dtype=np.int64), np.empty((heads, 0), dtype=bool)))
            continue
        elsewhere = np.delete(np.arange(len(excerpt.slots)), excerpt.rows)
        wants = np.broadcast_to(excerpt.wanted[:, elsewhere], (heads, len(elsewhere)))
        wants = np.concatenate((wants, np.ones((heads, extra_blocks), dtype=bool)), axis=1)
        wanted.append((np.concatenate((excerpt.slots[elsewhere], extra)), wants))
    full = np.array([*sorted({*pattern.full_rows, *shared}), *extra], dtype=np.int64)
    queries = make_fetch(shards, [(full, np.ones((heads, len(full)), dtype=bool))] * shards.size)
    return Exchanges(excerpts[shards.rank], make_fetch(shards, wanted), full, queries)


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """A batch of documents that processes share, and who reads whom.

    processes, shards: who holds what.
    pattern: which block reads which.
    engine: what computes the rows that do not read everything.
    key_mask: `bool`, `[batch, length of whole blocks and extra tokens]`, of the whole batch; None for all.
    global_tokens: those of the whole batch; None for none.
    """

    processes: Processes
    shards: Shards
    pattern: BlockPattern
    engine: Engine | None
    key_mask: Tensor | None
    global_tokens: GlobalTokens | None

    @property
    def length(self) -> int:
        """Of all blocks."""
        return self.pattern.num_blocks * self.pattern.block_size

    @property
    def num_extra(self) -> int:
        """How many extra tokens there are."""
        return 0 if self.global_tokens is None else self.global_tokens.num_extra

    def exchanges(self, heads: int) -> Exchanges:
        """What a layer of so many heads exchanges."""
        extra_blocks = count_blocks(self.num_extra, self.pattern.block_size)
        return plan_exchanges(self.pattern, self.shards, heads, self._shared_blocks(), extra_blocks)

    def _shared_blocks(self) -> tuple[int, ...]:
        if self.global_tokens is None:
            return ()
        places, is_token, _ = self.global_tokens
        blocks = torch.unique((places if is_token is None else places[is_token]) // self.pattern.block_size)
        return tuple(block for block in blocks.tolist() if block < self.pattern.num_blocks)

    def own(self, mask: Tensor, count: int) -> Tensor:
        """Of `[batch, length]` so many tokens, beginning with the first one of this process."""
        first = self.shards.own.start * self.pattern.block_size
        return mask[:, first : first + count]


def attend_together(query: Tensor, key: Tensor, value: Tensor, reading: Reading, *, scaling: float) -> Tensor:
    """The context of the tokens of this process.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`: those of its blocks and, on all processes alike, of the
            extra tokens, of which those of the last process count.
        reading: who reads whom.
        scaling: what the scores are multiplied by.
    """
    shards, num_extra, block_size = reading.shards, reading.num_extra, reading.pattern.block_size
    exchanges, size = reading.exchanges(query.shape[1]), query.shape[2]
    count = size if shards.rank == shards.size - 1 else size - num_extra
    queries, keys, values = (
        pad_to_blocks(tensor[:, :, :count], block_size, 2).unflatten(2, (-1, block_size))
        for tensor in (query, key, value)
    )
    context = _attend_to_excerpt(queries, keys, values, exchanges, reading, scaling)
    if len(exchanges.full):
        asked = exchanges.queries.of([queries], reading.processes)[0]
        full = _attend_to_all(asked, key[:, :, :count], value[:, :, :count], exchanges, reading, scaling)
        context = torch.where(_reads_all(reading, context), full, context)
    context = context.flatten(2, 3)[:, :, :count]
    if reading.key_mask is not None:
        context = context * reading.own(reading.key_mask, count)[:, None, :, None]
    return nn.functional.pad(context, (0, 0, 0, size - count))


def _attend_to_excerpt(query, key, value, exchanges, reading, scaling) -> Tensor:
    """The context of all blocks of this process, `[batch, heads, blocks, block, dim]`; zero, or anything, for rows
    that read everything."""
    fetched = exchanges.keys.of([key, value], reading.processes)
    excerpt = exchanges.excerpt
    if excerpt is None:
        return (query + fetched.sum()) * 0  # others wait for its gradient
    rows, end = excerpt.rows, len(excerpt.slots) * reading.pattern.block_size + reading.num_extra
    first = int(excerpt.slots[rows.start]) - reading.shards.own.start
    own = slice(first, first + len(rows))
    keys, values = (
        torch.cat((others[:, :, : rows.start], tensor[:, :, own], others[:, :, rows.start :]), dim=2).flatten(2, 3)
        for others, tensor in zip(fetched, (key, value), strict=True)
    )
    around = (rows.start, keys.shape[2] // query.shape[3] - rows.stop)
    queries = nn.functional.pad(query[:, :, own], (0, 0, 0, 0, *around)).flatten(2, 3)
    tensors = [tensor[:, :, :end] for tensor in (queries, keys, values)]
    masks = _key_mask_of(excerpt, reading), _global_tokens_of(excerpt, reading)
    context = reading.engine.forward(*tensors, excerpt.pattern, *masks, scaling=scaling)
    context = blocks_of(context.transpose(1, 2), excerpt.pattern)[:, rows.start : rows.stop].permute(0, 3, 1, 2, 4)
    return nn.functional.pad(context, (0, 0, 0, 0, first, query.shape[2] - first - len(rows)))


def _key_mask_of(excerpt: Excerpt, reading: Reading) -> Tensor | None:
    mask, length = reading.key_mask, reading.length
    if mask is None:
        return None
    slots = torch.from_numpy(excerpt.slots).to(mask.device)
    blocks = mask[:, :length].unflatten(1, (reading.pattern.num_blocks, -1))[:, slots].flatten(1)
    return torch.cat((blocks, mask[:, length:]), dim=1)


def _global_tokens_of(excerpt: Excerpt, reading: Reading) -> GlobalTokens | None:
    tokens, block_size = reading.global_tokens, reading.pattern.block_size
    if tokens is None:
        return None
    places_of_all = excerpt.places_of(np.arange(reading.pattern.num_blocks)).clip(0)  # what fills up may be anywhere
    slots = torch.from_numpy(places_of_all).to(tokens.places.device)
    is_extra = tokens.places >= reading.length
    block = (tokens.places // block_size).masked_fill(is_extra, 0)
    places = slots[block] * block_size + tokens.places % block_size
    extra = tokens.places - reading.length + len(excerpt.slots) * block_size
    return tokens._replace(places=torch.where(is_extra, extra, places))


def _attend_to_all(query, key, value, exchanges, reading, scaling) -> Tensor:
    """What the queries of all `exchanges.full` blocks, `[batch, heads, blocks, block, dim]`, read of all keys; of own
    keys, `[batch, heads, keys, dim]`. Each process gets that of its own blocks, with zeros for other ones."""
    num_blocks = count_blocks(key.shape[2], query.shape[3])
    shards, full = reading.shards, exchanges.full
    places = (torch.from_numpy(full)[:, None] * query.shape[3] + torch.arange(query.shape[3])).flatten()
    if reading.pattern.is_causal:
        seen = int(places[-1]) + 1 - shards.own.start * query.shape[3]
        key, value = key[:, :, : max(seen, 0)], value[:, :, : max(seen, 0)]
    bias = _bias(places.to(key.device), key, reading)
    with torch.autocast(query.device.type, enabled=False):
        context, log_sum_exp = _Part.apply(query.flatten(2, 3), key, value, bias, scaling)
    part = torch.cat((context, log_sum_exp), dim=-1).unflatten(2, query.shape[2:4]).movedim(2, 0)
    owners = shards.owners(full)
    sent = np.bincount(owners, minlength=shards.size).tolist()
    parts = reading.processes.exchange(part, sent, [sent[shards.rank]] * shards.size)
    context, log_sum_exp = parts.unflatten(0, (shards.size, -1)).split((query.shape[4], 1), dim=-1)
    merged = (context * log_sum_exp.softmax(0)).sum(0).to(query.dtype)
    own = torch.from_numpy(full[owners == shards.rank] - shards.own.start).to(merged.device)
    blocks = merged.new_zeros(num_blocks, *merged.shape[1:])
    return blocks.index_copy(0, own, merged).movedim(0, 2)


def _bias(places: Tensor, key: Tensor, reading: Reading) -> Tensor | None:
    """What is added to the scores of own keys, asked from these places: `[batch or 1, 1, queries or 1, keys]`."""
    count, mask = key.shape[2], None
    if reading.key_mask is not None:
        mask = reading.own(reading.key_mask, count)[:, None, None]
    if reading.pattern.is_causal:
        first = reading.shards.own.start * reading.pattern.block_size
        causal = causal_mask(places - first, count)[None, None]
        mask = causal if mask is None else mask & causal
    return None if mask is None else additive_mask(mask, score_dtype(key))


def _reads_all(reading: Reading, context: Tensor) -> Tensor:
    """`bool`, `[batch or 1, 1, blocks, block, 1]`: which of the tokens of `context` read everything."""
    pattern, tokens = reading.pattern, reading.global_tokens
    blocks = torch.zeros(pattern.num_blocks, dtype=torch.bool)
    blocks[pattern.full_rows] = True
    mask = blocks.to(context.device).repeat_interleave(pattern.block_size)[None]
    if tokens is not None:
        mask = nn.functional.pad(mask, (0, tokens.num_extra)) | tokens.mask(reading.length + tokens.num_extra)
    own = reading.own(mask, context.shape[2] * pattern.block_size)
    own = nn.functional.pad(own, (0, context.shape[2] * pattern.block_size - own.shape[1]))
    return own.unflatten(1, (-1, pattern.block_size))[:, None, ..., None]


class _Part(torch.autograd.Function):
    """Attention over some of the keys, and the log-sum-exp of its scores, `[..., 1]`, both in `score_dtype`."""

    @staticmethod
    def forward(ctx, query, key, value, bias, scaling):
        dtype = score_dtype(query)
        context = query.new_zeros(query.shape, dtype=dtype)
        log_sum_exp = query.new_full((*query.shape[:-1], 1), torch.finfo(dtype).min, dtype=dtype)
        for scores, keys in _scores(query, key, bias, scaling):
            part = scores.logsumexp(-1, keepdim=True)
            probabilities = (scores - part).exp().to(value.dtype)
            merge(context, log_sum_exp, (probabilities @ value[:, :, keys]).to(dtype), part)
        ctx.save_for_backward(query, key, value, bias, context, log_sum_exp)
        ctx.scaling = scaling
        return context, log_sum_exp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):
        query, key, value, bias, context, log_sum_exp = ctx.saved_tensors
        grads = torch.zeros_like(context), torch.empty_like(key), torch.empty_like(value)
        delta = (grad * context).sum(-1, keepdim=True) - grad_lse
        grad = grad.to(query.dtype)
        for scores, keys in _scores(query, key, bias, ctx.scaling):
            probabilities = (scores - log_sum_exp).exp()
            grads[2][:, :, keys] = probabilities.to(query.dtype).transpose(-1, -2) @ grad
            grad_scores = probabilities * ((grad @ value[:, :, keys].transpose(-1, -2)) - delta)
            grad_scores = (grad_scores * ctx.scaling).to(query.dtype)
            grads[0].add_(grad_scores @ key[:, :, keys])
            grads[1][:, :, keys] = grad_scores.transpose(-1, -2) @ query
        return grads[0].to(query.dtype), *grads[1:], None, None


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scaling: float) -> Iterator[tuple[Tensor, slice]]:
    """The scores of some keys after others, so many at once that little memory is taken."""
    dtype, count = score_dtype(query), key.shape[2]
    size = per_chunk(query[..., 0].numel() * dtype.itemsize)
    for run in chunks(0, count, size):
        keys = slice(run.start, run.stop)
        scores = (query @ key[:, :, keys].transpose(-1, -2)).to(dtype) * scaling
        yield scores if bias is None else scores + bias[..., keys], keys
