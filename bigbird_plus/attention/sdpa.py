"""The default engine but on NVIDIA's GPUs: time and memory linear in the length, on any device, with gradients.

Global blocks read everything: a dense attention with few rows. For the others there are two ways.

* On a CPU, where torch's flash attention tells the log-sum-exp of its scores, the keys of a row are read in parts, and
  the parts are merged: with outputs `o_p` and log-sum-exps `l_p`, `L = logsumexp(l_1, ..., l_p)` and
  `o = sum(o_p exp(l_p - L))`. The window is a strided view of the keys, nothing is copied for it. The gradient of each
  part is that of flash attention itself, given the merged `o` and `L` (as in ring attention, arXiv 2310.01889): the
  probabilities it recomputes from `L` are those of the whole softmax. Masks hold the least finite number, never -inf:
  for a row of nothing but -inf that flash attention returns a log-sum-exp of 0, which cannot be merged.
* Elsewhere the blocks that each row reads are gathered, and given to `scaled_dot_product_attention`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..memory import pieces_at_once, runs
from .eager import score_dtype
from .global_tokens import GlobalTokens, no_global_tokens
from .masks import additive_mask, causal_mask, is_tracing
from .pattern import BlockPattern, CausalPattern
from .random_blocks import NO_BLOCK

flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern | CausalPattern,
    key_mask: Tensor | None,
    global_tokens: GlobalTokens | None = None,
    *,
    scaling: float,
) -> Tensor:
    """The context of `eager.block_sparse_attention`, `[batch, heads, length, head_dim]`, from the same arguments. With
    a `CausalPattern` that of `eager.causal_attention`, for documents that begin at the first place."""
    merges = can_merge(query)
    bias_dtype = score_dtype(query) if merges else query.dtype
    bias = None if key_mask is None else additive_mask(key_mask, bias_dtype)
    num_extra = 0 if global_tokens is None else global_tokens.num_extra
    layout = _Layout(pattern.num_blocks, (query.shape[2] - num_extra) // pattern.num_blocks)
    if pattern.middle_blocks:
        global_tokens = global_tokens or no_global_tokens(query.shape[0], query.device)
        global_tokens = global_tokens.with_blocks(pattern.middle_blocks, layout.block_size)
    tensors = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    if merges:
        context = _MergedFlashAttention.apply(*tensors, bias, pattern, global_tokens, layout, scaling)
    elif isinstance(pattern, CausalPattern):
        context = _gathered_causal_attention(*tensors, bias, pattern, layout, scaling)
    else:
        context = _gathered_attention(*tensors, bias, pattern, global_tokens, layout, scaling)
    if key_mask is not None:
        context = context * key_mask[:, :, None, None]
    return context.transpose(1, 2)


def can_merge(query: Tensor) -> bool:
    """Whether flash attention tells the log-sum-exp of its scores here. Graphs are made of what every device has."""
    return query.device.type == "cpu" and not is_tracing()


class _Layout(NamedTuple):
    """How the tokens of an input stand in blocks. Tensors are `[batch, tokens, heads, dim]`, as projections come."""

    num_blocks: int
    block_size: int

    def blocks(self, tensor: Tensor) -> Tensor:
        """`[batch, tokens, ...]` as `[batch, blocks, block, ...]`, without the extra tokens: a view, of which blocks,
        runs of blocks and windows of blocks are views."""
        return tensor[:, : self.num_blocks * self.block_size].unflatten(1, (self.num_blocks, self.block_size))


def _as_sequence(blocks: Tensor) -> Tensor:
    """`[batch, blocks, block, heads, dim]` as `[batch, heads, length, dim]`, without a copy."""
    return blocks.flatten(1, 2).transpose(1, 2)


def _reshape(tensor: Tensor, *shape: int, leading: int = 1) -> Tensor:
    """`tensor.reshape(shape)`. While a graph is traced, by way of a vector, and of a matrix whose rows are so many
    `leading` dimensions: to join dimensions of sizes `m` and `b` directly, torch asks whether `m % (m b)` is 0, to
    which it knows no answer for a free length."""
    if not is_tracing():
        return tensor.reshape(shape)
    return tensor.reshape(-1).view(math.prod(shape[:leading]), math.prod(shape[leading:])).view(shape)


def _join(tensor: Tensor, dim: int) -> Tensor:
    """`tensor` with a dimension and the next one as one."""
    first, second = tensor.shape[dim : dim + 2]
    return _reshape(tensor, *tensor.shape[:dim], first * second, *tensor.shape[dim + 2 :], leading=dim + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Gathered blocks
# ---------------------------------------------------------------------------------------------------------------------


class _Lists(NamedTuple):
    """The blocks that some rows read, as indices into the blocks of a document.

    blocks: `int64` tensor `[rows, heads or 1, blocks]`.
    bias: `[rows, heads or 1, blocks]`: the logarithm of how many times a block is read, the least finite number where
        the place is empty; `None` where it would be zero throughout.
    """

    blocks: Tensor
    bias: Tensor | None

    def gather(self, tensor: Tensor) -> Tensor:
        """From `[batch, blocks, block, heads, dim]` the blocks of each row: `[batch * rows, heads, keys, dim]`."""
        batch, num_blocks, block, heads, dim = tensor.shape
        rows, _, count = self.blocks.shape
        if self.blocks.shape[1] == 1:
            return _join(tensor[:, self.blocks[:, 0]].flatten(2, 3), 0).transpose(1, 2)
        vectors = _reshape(tensor, batch * num_blocks * block * heads, dim)
        vectors = vectors.index_select(0, self._places(tensor).reshape(-1))
        return _reshape(vectors, batch * rows, heads, count * block, dim)

    def scatter_add(self, grad: Tensor, target: Tensor) -> None:
        """The transpose of `gather`: adds `[batch * rows, heads, keys, dim]` to the blocks of `target` they are of."""
        batch, _, block, heads, dim = target.shape
        if self.blocks.shape[1] == 1:
            target.index_add_(1, self.blocks.flatten(), grad.transpose(1, 2).reshape(batch, -1, block, heads, dim))
            return
        places = self._places(target[:1]).flatten()
        for document, part in zip(target, grad.unflatten(0, (batch, -1)), strict=True):
            document.view(-1, dim).index_add_(0, places, part.reshape(-1, dim))

    def _places(self, tensor: Tensor) -> Tensor:
        """`int64`, `[batch, rows, heads, blocks, block]`: where the vectors are that the heads read, among all."""
        batch, num_blocks, block, heads, _ = tensor.shape
        document, token, head = (torch.arange(size, device=tensor.device) for size in (batch, block, heads))
        blocks = document[:, None, None, None] * num_blocks + self.blocks
        return (blocks[..., None] * block + token) * heads + head[:, None, None]

    def key_bias(self, mask_bias: Tensor | None, layout: _Layout) -> Tensor | None:
        """What is added to the scores of the gathered keys, broadcastable to `[batch, rows, heads, queries, keys]`."""
        bias = None
        if self.bias is not None:
            bias = self.bias.repeat_interleave(layout.block_size, dim=-1)[None, :, :, None]
        if mask_bias is not None:
            masked = layout.blocks(mask_bias)[:, self.blocks].flatten(3, 4)[:, :, :, None]
            bias = masked if bias is None else (bias + masked).clamp(min=torch.finfo(bias.dtype).min)
        return bias


def _blocks_read(pattern: BlockPattern | CausalPattern, first: int, last: int, *, structured: bool = True) -> Tensor:
    """The random blocks of the rows from `first` to `last`, and with `structured` those of the window and the outer
    ones, too: `int64`, `[rows, heads or 1, blocks]`, with `NO_BLOCK` in empty places."""
    lists = pattern.structured_lists(first, last)[:, None] if structured else None
    if pattern.random_blocks is None:
        return lists
    random = torch.as_tensor(pattern.random_blocks)[:, first:last].transpose(0, 1)
    return random if lists is None else torch.cat((lists.expand(-1, random.shape[1], -1), random), dim=-1)


def _list_blocks(
    pattern: BlockPattern | CausalPattern, first: int, last: int, device, dtype: torch.dtype, *, structured: bool
) -> _Lists:
    """`_blocks_read`, to gather them."""
    lists = _blocks_read(pattern, first, last, structured=structured)
    empty = lists == NO_BLOCK
    bias = additive_mask(~empty, dtype)
    if structured and pattern.first_block_extra:
        bias[..., 0] = math.log1p(pattern.first_block_extra)
    is_needed = is_tracing() or bias.any()
    return _Lists(lists.masked_fill(empty, 0).to(device), bias.to(device) if is_needed else None)


def _unread_bias(
    pattern: BlockPattern,
    first: int,
    last: int,
    tokens: GlobalTokens,
    mask_bias: Tensor | None,
    block_size: int,
    dtype,
) -> Tensor:
    """What the rows from `first` to `last` add to the scores of the global tokens, `[batch, rows, heads or 1,
    tokens]`: 0 for those that they would not read otherwise, the least finite number for others and for padding."""
    block = (tokens.places // block_size)[:, None, None]
    lists = _blocks_read(pattern, first, last).to(block.device)
    unread = torch.ones_like(block, dtype=torch.bool)
    for listed in lists.unbind(-1):
        unread = unread & (block != listed[None, :, :, None])
    if tokens.is_token is not None:
        unread = unread & tokens.is_token[:, None, None]
    bias = additive_mask(unread, dtype)
    return bias if mask_bias is None else torch.minimum(bias, tokens.take(mask_bias)[:, None, None])


def _gathered_attention(query, key, value, bias, pattern, global_tokens, layout, scaling) -> Tensor:
    """Block-sparse attention on `[batch, tokens, heads, dim]` with plain `scaled_dot_product_attention`."""
    first, last = pattern.first_row, pattern.last_row
    inner = _attend_to_lists(query, key, value, bias, pattern, first, last, layout, scaling, tokens=global_tokens)
    blocks = layout.blocks(query)
    readers_of_all = [blocks[:, :first].flatten(1, 2), blocks[:, last:].flatten(1, 2)]
    if global_tokens is not None:
        readers_of_all.append(global_tokens.take(query))
    elif not pattern.num_leading + pattern.num_trailing:
        return _join(inner, 1)
    outer_query = torch.cat(readers_of_all, dim=1).transpose(1, 2)
    outer_bias = None if bias is None else bias[:, None, None]
    attend = nn.functional.scaled_dot_product_attention
    outer = attend(outer_query, key.transpose(1, 2), value.transpose(1, 2), outer_bias, scale=scaling)
    leading, trailing, *chosen = outer.transpose(1, 2).split([part.shape[1] for part in readers_of_all], dim=1)
    context = torch.cat((leading, _join(inner, 1), trailing), dim=1)
    if global_tokens is None:
        return context
    context = nn.functional.pad(context, (0, 0, 0, 0, 0, global_tokens.num_extra))
    global_tokens.put(*chosen, context)
    return context


def _gathered_causal_attention(query, key, value, bias, pattern, layout, scaling) -> Tensor:
    """The same for a decoder."""
    block_size, first = layout.block_size, pattern.first_sparse_row
    full_bias = _causal_bias(first * block_size, query.device, query.dtype)
    if bias is not None:
        full_bias = torch.minimum(full_bias, bias[:, None, None, : full_bias.shape[0]])
    tensors = [tensor[:, : first * block_size].transpose(1, 2) for tensor in (query, key, value)]
    full = nn.functional.scaled_dot_product_attention(*tensors, full_bias, scale=scaling).transpose(1, 2)
    if first == pattern.num_blocks:
        return full
    window = _causal_bias(block_size, query.device, query.dtype, before=pattern.window - 1)
    listed = (pattern.num_leading, pattern.random_blocks.shape[2] if pattern.random_blocks is not None else 0)
    own_block = nn.functional.pad(window, [blocks * block_size for blocks in listed])
    # One row more than needed, which is left out again: of a free number of rows, torch asks whether it is 1.
    rows = (first - 1, pattern.num_blocks)
    sparse = _attend_to_lists(query, key, value, bias, pattern, *rows, layout, scaling, own_block=own_block)
    return torch.cat((full, _join(sparse, 1)[:, block_size:]), dim=1)


def _attend_to_lists(
    query, key, value, bias, pattern, first, last, layout, scaling, *, own_block=None, tokens=None
) -> Tensor:
    """What the rows from `first` to `last` read, gathered: `[batch, rows, block, heads, dim]`. `own_block`, `[block,
    keys]`, is added to the scores of each row; `tokens` are the global ones, which they read besides."""
    batch, block_size = query.shape[0], layout.block_size
    lists = _list_blocks(pattern, first, last, query.device, query.dtype, structured=True)
    keys, values = (lists.gather(layout.blocks(tensor)) for tensor in (key, value))
    score_bias = lists.key_bias(bias, layout)
    if tokens is not None:
        unread = _unread_bias(pattern, first, last, tokens, bias, block_size, query.dtype)[:, :, :, None]
        if score_bias is None:
            score_bias = unread.new_zeros(*unread.shape[:4], keys.shape[2])
        score_bias = torch.cat((score_bias.expand(batch, -1, -1, -1, -1), unread), dim=-1)
        chosen = (tokens.take(tensor).transpose(1, 2)[:, None] for tensor in (key, value))
        keys, values = (
            torch.cat((tensor, _join(more.expand(-1, last - first, -1, -1, -1), 0)), dim=2)
            for tensor, more in zip((keys, values), chosen, strict=True)
        )
    if score_bias is not None:
        score_bias = score_bias + score_bias.new_zeros(batch, 1, 1, 1, 1)  # `expand` would copy it later, or not
        score_bias = _join(score_bias, 0).expand(-1, -1, block_size, -1)
    if own_block is not None:
        score_bias = own_block if score_bias is None else torch.minimum(score_bias, own_block)
    rows = torch.arange(first, last, device=query.device)  # not a slice, of which torch asks whether the batch is 1
    row_query = _join(layout.blocks(query).index_select(1, rows), 0).transpose(1, 2)
    context = nn.functional.scaled_dot_product_attention(row_query, keys, values, score_bias, scale=scaling)
    return context.transpose(1, 2).unflatten(0, (batch, last - first))


def _causal_bias(block_size: int, device, dtype: torch.dtype, before: int = 0) -> Tensor:
    """What hides later tokens from those of a block: `[block, keys]`, the keys being those of `before` blocks before
    it and its own."""
    places = torch.arange(block_size, device=device) + before * block_size
    return additive_mask(causal_mask(places, (before + 1) * block_size), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Merged parts
# ---------------------------------------------------------------------------------------------------------------------


class _DensePart:
    """Some rows that all read the same blocks. `blocks` is None for all tokens of the input. With `is_causal` rows
    and blocks are the first ones, and each token reads those up to itself."""

    def __init__(self, layout, rows, blocks=None, log_counts=None, is_causal=False):
        self.layout, self.rows, self.read, self.log_counts = layout, rows, blocks, log_counts
        self.is_causal = is_causal

    def queries(self, tensor):
        """`[batch, tokens, heads, dim]` -> `[n, heads, queries, dim]`: what each of n attentions asks."""
        return _as_sequence(self.layout.blocks(tensor)[:, self.rows])

    def keys(self, tensor):
        """`[batch, tokens, heads, dim]` -> `[n, heads, keys, dim]`: what each of n attentions reads."""
        return tensor.transpose(1, 2) if self.read is None else _as_sequence(self.layout.blocks(tensor)[:, self.read])

    def key_bias(self, mask_bias):
        """What is added to the scores, broadcastable to `[n, heads, queries, keys]`, or None."""
        bias = None
        if self.log_counts is not None:
            bias = self.log_counts.repeat_interleave(self.layout.block_size)[None, None, None]
        if mask_bias is not None:
            if self.read is not None:
                mask_bias = self.layout.blocks(mask_bias)[:, self.read].flatten(1)
            bias = mask_bias[:, None, None] if bias is None else mask_bias[:, None, None] + bias
        return bias

    def log_sum_exps(self, tensor):
        """`queries` of the merged log-sum-exps `[batch, tokens, heads]`, to give to the backward."""
        return self.queries(tensor.unsqueeze(-1)).squeeze(-1)

    def to_rows(self, output):
        """The transpose of `queries`: `[n, heads, queries, dim]` -> `[batch, rows, block, heads, dim]`."""
        return output.transpose(1, 2).unflatten(1, (-1, self.layout.block_size))

    def put(self, rows, target):
        """Writes what `to_rows` gives to where it belongs in `target`, `[batch, tokens, ...]`."""
        self.layout.blocks(target)[:, self.rows] = rows

    def add(self, grad, target):
        """The transpose of `keys`: adds `[n, heads, keys, dim]` to where it came from."""
        grad = grad.transpose(1, 2)
        if self.read is None:
            target += grad
        else:
            self.layout.blocks(target)[:, self.read] += grad.unflatten(1, (-1, self.layout.block_size))


class _GatheredPart(_DensePart):
    """Rows that read a list of blocks each: n is batch times rows."""

    def __init__(self, layout, rows, lists, batch):
        super().__init__(layout, slice(rows.start, rows.stop))
        self.lists, self.batch = lists, batch

    def queries(self, tensor):
        return self.layout.blocks(tensor)[:, self.rows].flatten(0, 1).transpose(1, 2)

    def keys(self, tensor):
        return self.lists.gather(self.layout.blocks(tensor))

    def key_bias(self, mask_bias):
        bias = self.lists.key_bias(mask_bias, self.layout)
        return None if bias is None else bias.expand(self.batch, -1, -1, -1, -1).flatten(0, 1)

    def to_rows(self, output):
        return output.transpose(1, 2).unflatten(0, (self.batch, -1))

    def add(self, grad, target):
        self.lists.scatter_add(grad, self.layout.blocks(target))


class _WindowPart(_DensePart):
    """Rows that read the blocks around them: so many `before` and `after` their own. All documents stand in one row of
    tokens, of which the windows are one strided view; n is the number of windows. Those across the border of two
    documents belong to rows that do not take part: what they give is left out. `own_block`, `[block, keys]`, is added
    to the scores of every window."""

    def __init__(self, layout, rows, batch, before, after, own_block=None):
        super().__init__(layout, slice(rows.start, rows.stop))
        self.row_count, self.batch, self.before, self.after = len(rows), batch, before, after
        self.first, self.last = rows.start, (batch - 1) * layout.num_blocks + rows.stop
        self.own_block = own_block

    def queries(self, tensor):
        return self._rows(tensor).transpose(1, 2)

    def keys(self, tensor):
        return self._windows(tensor).transpose(-1, -2)

    def key_bias(self, mask_bias):
        own_block = None if self.own_block is None else self.own_block[None, None]
        if mask_bias is None:
            return own_block
        bias = self._windows(mask_bias)[:, None, None]
        return bias if own_block is None else torch.minimum(bias, own_block)

    def log_sum_exps(self, tensor):
        rows = self._rows(tensor)
        if self.batch > 1:  # windows across a border: a huge log-sum-exp makes their probabilities zero
            index = torch.arange(self.first, self.last, device=tensor.device) % self.layout.num_blocks
            across = (index < self.rows.start) | (index >= self.rows.stop)
            rows = rows.masked_fill(across[:, None, None], torch.finfo(rows.dtype).max)
        return rows.transpose(1, 2)

    def to_rows(self, output):
        output = output.transpose(1, 2)
        shape = (self.batch, self.row_count, *output.shape[1:])
        return output.as_strided(shape, (self.layout.num_blocks * output.stride(0), *output.stride()))

    def add(self, grad, target):
        blocks = self.layout.blocks(target)
        for place, piece in enumerate(grad.split(self.layout.block_size, dim=2)):
            start = self.rows.start - self.before + place
            blocks[:, start : start + self.row_count] += self.to_rows(piece)

    def _rows(self, tensor):
        """`[batch, tokens, ...]` -> `[windows, block, ...]`."""
        return self.layout.blocks(tensor).flatten(0, 1)[self.first : self.last]

    def _windows(self, tensor):
        """`[batch, tokens, ...]` -> `[windows, ..., window tokens]`."""
        block_size = self.layout.block_size
        start, stop = (self.first - self.before) * block_size, (self.last + self.after) * block_size
        tokens = self.layout.blocks(tensor).flatten(0, 2)[start:stop]
        return tokens.unfold(0, (self.before + 1 + self.after) * block_size, block_size)


class _UnreadTokensPart(_DensePart):
    """Rows that read those global tokens which they would not read otherwise."""

    def __init__(self, layout, rows, pattern, tokens, dtype):
        super().__init__(layout, slice(rows.start, rows.stop))
        self.pattern, self.tokens, self.dtype = pattern, tokens, dtype

    def keys(self, tensor):
        return self.tokens.take(tensor).transpose(1, 2)

    def key_bias(self, mask_bias):
        rows, block_size = (self.rows.start, self.rows.stop), self.layout.block_size
        bias = _unread_bias(self.pattern, *rows, self.tokens, mask_bias, block_size, self.dtype)
        return bias.transpose(1, 2).repeat_interleave(block_size, dim=2)

    def add(self, grad, target):
        self.tokens.add(grad.transpose(1, 2), target)


class _GlobalTokensPart(_DensePart):
    """The global tokens, which read everything: n is batch."""

    def __init__(self, layout, tokens):
        super().__init__(layout, None)
        self.tokens = tokens

    def queries(self, tensor):
        return self.tokens.take(tensor).transpose(1, 2)

    def log_sum_exps(self, tensor):
        log_sum_exps = super().log_sum_exps(tensor)
        if self.tokens.is_token is None:
            return log_sum_exps
        return log_sum_exps.masked_fill(~self.tokens.is_token[:, None], torch.finfo(tensor.dtype).max)

    def to_rows(self, output):
        return output.transpose(1, 2)

    def put(self, rows, target):
        self.tokens.put(rows, target)


def _row_groups(pattern, query, tokens: GlobalTokens | None, layout: _Layout, size: int) -> list[list[_DensePart]]:
    """The rows of the pattern, each in one group: the parts that the rows of a group read. Of the rows with windows,
    `size` make up a group."""
    if isinstance(pattern, CausalPattern):
        return _causal_row_groups(pattern, query, layout, size)
    batch, device, dtype = query.shape[0], query.device, score_dtype(query)
    groups = []
    if pattern.outer_blocks:
        groups.append([_DensePart(layout, pattern.outer_blocks)])
    inner = pattern.inner_rows
    if not inner:
        inner = range(pattern.last_row, pattern.last_row)
    for rows in (range(pattern.first_row, inner.start), range(inner.stop, pattern.last_row)):
        if rows:
            lists = _list_blocks(pattern, rows.start, rows.stop, device, dtype, structured=True)
            groups.append([_GatheredPart(layout, rows, lists, batch)])
    for rows in runs(inner.start, inner.stop, size):
        groups.append([_WindowPart(layout, rows, batch, pattern.half_window, pattern.half_window)])
        if pattern.outer_blocks:
            log_counts = outer_log_counts(pattern, device, dtype)
            groups[-1].append(_DensePart(layout, slice(rows.start, rows.stop), pattern.outer_blocks, log_counts))
        groups[-1] += _random_parts(pattern, rows, batch, layout, device, dtype)
    if tokens is not None:
        for parts in groups[bool(pattern.outer_blocks) :]:
            parts.append(_UnreadTokensPart(layout, parts[0].rows, pattern, tokens, dtype))
    return groups


def _causal_row_groups(pattern: CausalPattern, query: Tensor, layout: _Layout, size: int) -> list[list[_DensePart]]:
    """The same for a decoder."""
    batch, device, dtype = query.shape[0], query.device, score_dtype(query)
    full = slice(0, pattern.first_sparse_row)
    groups = [[_DensePart(layout, full, full, is_causal=True)]]
    before = pattern.window - 1
    own_block = _causal_bias(layout.block_size, device, dtype, before)
    for rows in runs(full.stop, pattern.num_blocks, size):
        groups.append([_WindowPart(layout, rows, batch, before, 0, own_block)])
        if pattern.num_leading:
            groups[-1].append(_DensePart(layout, slice(rows.start, rows.stop), slice(0, pattern.num_leading)))
        groups[-1] += _random_parts(pattern, rows, batch, layout, device, dtype)
    return groups


def _random_parts(pattern, rows: range, batch: int, layout: _Layout, device, dtype) -> list[_DensePart]:
    if pattern.random_blocks is None:
        return []
    lists = _list_blocks(pattern, rows.start, rows.stop, device, dtype, structured=False)
    return [_GatheredPart(layout, rows, lists, batch)]


def outer_log_counts(pattern: BlockPattern, device, dtype: torch.dtype) -> Tensor | None:
    """The logarithm of how many times the rows that are not global read each outer block; None for once each."""
    if not pattern.first_block_extra:
        return None
    log_counts = torch.zeros(len(pattern.outer_blocks), dtype=dtype, device=device)
    log_counts[0] = math.log1p(pattern.first_block_extra)
    return log_counts


class _MergedFlashAttention(torch.autograd.Function):
    """Block-sparse attention on `[batch, tokens, heads, dim]`, from flash attentions that are merged."""

    @staticmethod
    def forward(ctx, query, key, value, bias, pattern, tokens, layout, scaling):
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        log_sum_exp = torch.empty(query.shape[:-1], dtype=score_dtype(query))
        for documents, groups in _shares(query, pattern, tokens, layout):
            inputs = _of(documents, query, key, value, bias)
            for parts in groups:
                _attend(*_of(documents, output, log_sum_exp), parts, *inputs, scaling)
        ctx.save_for_backward(query, key, value, bias, output, log_sum_exp)
        ctx.pattern, ctx.tokens, ctx.layout, ctx.scaling = pattern, tokens, layout, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, bias, output, log_sum_exp = ctx.saved_tensors
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_key, grad_value = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (key, value))
        grads, saved = (grad_query, grad_key, grad_value), (query, key, value, bias, output)
        elsewhere = _outside_of_global_tokens(log_sum_exp, ctx.tokens)
        for documents, groups in _shares(query, ctx.pattern, ctx.tokens, ctx.layout):
            inputs = _of(documents, grad_output, *saved)
            for parts in groups:
                lse = log_sum_exp if isinstance(parts[0], _GlobalTokensPart) else elsewhere
                _add_gradients(_of(documents, *grads), parts, *inputs, *_of(documents, lse), ctx.scaling)
        return *grads, None, None, None, None, None


def _shares(query, pattern, tokens: GlobalTokens | None, layout: _Layout):
    """What is done at once, so that the memory that it takes is used again for the next: as slices of the documents of
    the batch, with the `_row_groups` of each. The global tokens come last: what they read as members of their blocks
    does not count."""
    batch, _, heads, dim = query.shape
    size = pieces_at_once(pattern.window * layout.block_size * heads * dim * query.element_size())
    for share in runs(0, batch, max(1, size // layout.num_blocks)):
        documents = slice(share.start, share.stop)
        own = None if tokens is None else tokens.of_documents(documents)
        groups = _row_groups(pattern, query[documents], own, layout, size)
        yield documents, groups if own is None else [*groups, [_GlobalTokensPart(layout, own)]]


def _of(documents: slice, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor[documents] for tensor in tensors]


def _outside_of_global_tokens(log_sum_exp: Tensor, tokens: GlobalTokens | None) -> Tensor:
    """`log_sum_exp`, `[batch, tokens, heads]`, but huge at the global tokens: their probabilities are zero then."""
    if tokens is None:
        return log_sum_exp
    elsewhere = log_sum_exp.clone()
    tokens.put(torch.full_like(tokens.take(elsewhere), torch.finfo(elsewhere.dtype).max), elsewhere)
    return elsewhere


def _attend(output, log_sum_exp, parts, query, key, value, bias, scaling) -> None:
    """Writes to `output` and `log_sum_exp` what comes to a group of rows."""
    merged = None
    for part in parts:
        out, lse = flash_attention(
            part.queries(query),
            part.keys(key),
            part.keys(value),
            is_causal=part.is_causal,
            attn_mask=part.key_bias(bias),
            scale=scaling,
        )
        result = (part.to_rows(t) for t in (out, lse.unsqueeze(-1)))
        merged = tuple(result) if merged is None else merge(*merged, *result)
    part.put(merged[0], output)
    part.put(merged[1].squeeze(-1), log_sum_exp)


def _add_gradients(grads, parts, grad_output, query, key, value, bias, output, log_sum_exp, scaling) -> None:
    """What comes to queries, keys and values through a group of rows: written to the first of `grads`, added to the
    others."""
    grad_query, grad_key, grad_value = grads
    grad_rows = None
    for part in parts:
        part_grads = flash_attention_backward(
            part.queries(grad_output),
            part.queries(query),
            part.keys(key),
            part.keys(value),
            part.queries(output),
            part.log_sum_exps(log_sum_exp),
            0.0,
            part.is_causal,
            attn_mask=part.key_bias(bias),
            scale=scaling,
        )
        part_rows = part.to_rows(part_grads[0])
        grad_rows = part_rows if grad_rows is None else grad_rows.add_(part_rows)
        part.add(part_grads[1], grad_key)
        part.add(part_grads[2], grad_value)
    part.put(grad_rows, grad_query)


def merge(output: Tensor, log_sum_exp: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attentions over either, each with its log-sum-exp `[..., 1]`. In place
    of the first."""
    share = torch.sigmoid(other_lse - log_sum_exp)
    torch.logaddexp(log_sum_exp, other_lse, out=log_sum_exp)
    return output.lerp_(other, share.to(output.dtype)), log_sum_exp
