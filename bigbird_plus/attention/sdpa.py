"""The default engine: time and memory linear in the length, on any device, with gradients.

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

from .eager import score_dtype
from .masks import additive_mask, causal_mask, is_tracing
from .pattern import BlockPattern, CausalPattern
from .random_blocks import NO_BLOCK

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern | CausalPattern,
    key_mask: Tensor | None,
    *,
    scaling: float,
) -> Tensor:
    """The context of `eager.block_sparse_attention`, `[batch, heads, length, head_dim]`, from the same arguments. With
    a `CausalPattern` that of `eager.causal_attention`, for documents that begin at the first place."""
    merges = _can_merge(query)
    bias_dtype = score_dtype(query) if merges else query.dtype
    bias = None if key_mask is None else additive_mask(key_mask, bias_dtype)
    blocked = [_split_into_blocks(tensor, pattern.num_blocks) for tensor in (query, key, value)]
    if merges:
        context = _MergedFlashAttention.apply(*blocked, bias, pattern, scaling)
    elif isinstance(pattern, CausalPattern):
        context = _gathered_causal_attention(*blocked, bias, pattern, scaling)
    else:
        context = _gathered_attention(*blocked, bias, pattern, scaling)
    context = context.flatten(1, 2)
    if key_mask is not None:
        context = context * key_mask[:, :, None, None]
    return context.transpose(1, 2)


def _can_merge(query: Tensor) -> bool:
    """Whether flash attention tells the log-sum-exp of its scores here. Graphs are made of what every device has."""
    return query.device.type == "cpu" and not is_tracing()


def _split_into_blocks(tensor: Tensor, num_blocks: int) -> Tensor:
    """`[batch, heads, length, dim]` as `[batch, blocks, block, heads, dim]`, the layout in which projections come, so
    that blocks, runs of blocks and windows of blocks are views."""
    return tensor.transpose(1, 2).unflatten(1, (num_blocks, -1))


def _as_sequence(blocks: Tensor) -> Tensor:
    """`[batch, blocks, block, heads, dim]` as `[batch, heads, length, dim]`, without a copy."""
    return blocks.flatten(1, 2).transpose(1, 2)


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
        """From `[batch, blocks, block, heads, dim]` the blocks of each row: `[batch, rows, heads, keys, dim]`."""
        batch, _, block, heads, dim = tensor.shape
        if self.blocks.shape[1] == 1:
            return tensor[:, self.blocks[:, 0]].flatten(2, 3).transpose(2, 3)
        pieces = tensor.transpose(2, 3).reshape(-1, block * dim)
        pieces = pieces.index_select(0, self._places(tensor).flatten())
        return pieces.view(batch, len(self.blocks), heads, -1, dim)

    def scatter_add(self, grad: Tensor, target: Tensor) -> None:
        """The transpose of `gather`: adds `[batch, rows, heads, keys, dim]` to the blocks of `target` it came from."""
        batch, num_blocks, block, heads, dim = target.shape
        if self.blocks.shape[1] == 1:
            target.index_add_(1, self.blocks.flatten(), grad.transpose(2, 3).reshape(batch, -1, block, heads, dim))
            return
        total = target.new_zeros(batch * num_blocks * heads, block * dim)
        total.index_add_(0, self._places(target).flatten(), grad.reshape(-1, block * dim))
        target += total.view(batch, num_blocks, heads, block, dim).transpose(2, 3)

    def _places(self, tensor: Tensor) -> Tensor:
        """`int64`, `[batch, rows, heads, blocks]`: indices among the blocks of all documents and heads, by head."""
        batch, num_blocks, _, heads, _ = tensor.shape
        head = torch.arange(heads, device=tensor.device)[:, None]
        document = torch.arange(batch, device=tensor.device)[:, None, None, None]
        return (document * num_blocks + self.blocks) * heads + head

    def key_bias(self, mask_bias: Tensor | None, block_size: int) -> Tensor | None:
        """What is added to the scores of the gathered keys, broadcastable to `[batch, rows, heads, queries, keys]`."""
        bias = None
        if self.bias is not None:
            bias = self.bias.repeat_interleave(block_size, dim=-1)[None, :, :, None]
        if mask_bias is not None:
            masked = mask_bias.unflatten(1, (-1, block_size))[:, self.blocks].flatten(3, 4)[:, :, :, None]
            bias = masked if bias is None else (bias + masked).clamp(min=torch.finfo(bias.dtype).min)
        return bias


def _list_blocks(
    pattern: BlockPattern | CausalPattern, first: int, last: int, device, dtype: torch.dtype, *, structured: bool
) -> _Lists:
    """The random blocks of the rows from `first` to `last`, and with `structured` those of the window and the global
    ones, too."""
    lists = pattern.structured_lists(first, last)[:, None] if structured else None
    if pattern.random_blocks is not None:
        random = torch.as_tensor(pattern.random_blocks)[:, first:last].transpose(0, 1)
        lists = random if lists is None else torch.cat((lists.expand(-1, random.shape[1], -1), random), dim=-1)
    empty = lists == NO_BLOCK
    bias = additive_mask(~empty, dtype)
    if structured and pattern.first_block_extra:
        bias[..., 0] = math.log1p(pattern.first_block_extra)
    is_needed = is_tracing() or bias.any()
    return _Lists(lists.masked_fill(empty, 0).to(device), bias.to(device) if is_needed else None)


def _gathered_attention(query, key, value, bias, pattern, scaling) -> Tensor:
    """Block-sparse attention on `[batch, blocks, block, heads, dim]` with plain `scaled_dot_product_attention`."""
    first, last = pattern.first_row, pattern.last_row
    inner = _attend_to_lists(query, key, value, bias, pattern, first, last, scaling)
    if not pattern.num_leading + pattern.num_trailing:
        return inner
    global_query = _as_sequence(torch.cat((query[:, :first], query[:, last:]), dim=1))
    global_bias = None if bias is None else bias[:, None, None]
    attend = nn.functional.scaled_dot_product_attention
    outer = attend(global_query, _as_sequence(key), _as_sequence(value), global_bias, scale=scaling)
    outer = outer.transpose(1, 2).unflatten(1, (-1, query.shape[2]))
    return torch.cat((outer[:, :first], inner, outer[:, first:]), dim=1)


def _gathered_causal_attention(query, key, value, bias, pattern, scaling) -> Tensor:
    """The same for a decoder."""
    block_size, first = query.shape[2], pattern.first_sparse_row
    full_bias = _causal_bias(first * block_size, query.device, query.dtype)
    if bias is not None:
        full_bias = torch.minimum(full_bias, bias[:, None, None, : full_bias.shape[0]])
    tensors = [_as_sequence(tensor[:, :first]) for tensor in (query, key, value)]
    full = nn.functional.scaled_dot_product_attention(*tensors, full_bias, scale=scaling)
    full = full.transpose(1, 2).unflatten(1, (-1, block_size))
    if first == pattern.num_blocks:
        return full
    window = _causal_bias(block_size, query.device, query.dtype, before=pattern.window - 1)
    listed = (pattern.num_leading, pattern.random_blocks.shape[2] if pattern.random_blocks is not None else 0)
    own_block = nn.functional.pad(window, [blocks * block_size for blocks in listed])
    sparse = _attend_to_lists(query, key, value, bias, pattern, first, pattern.num_blocks, scaling, own_block)
    return torch.cat((full, sparse), dim=1)


def _attend_to_lists(query, key, value, bias, pattern, first, last, scaling, own_block=None) -> Tensor:
    """What the rows from `first` to `last` read, gathered: `[batch, rows, block, heads, dim]`. `own_block`, `[block,
    keys]`, is added to the scores of each row."""
    batch, _, block_size, _, _ = query.shape
    lists = _list_blocks(pattern, first, last, query.device, query.dtype, structured=True)
    keys, values = (lists.gather(tensor).flatten(0, 1) for tensor in (key, value))
    score_bias = lists.key_bias(bias, block_size)
    if score_bias is not None:
        score_bias = score_bias.expand(batch, -1, -1, block_size, -1).flatten(0, 1)
    if own_block is not None:
        score_bias = own_block if score_bias is None else torch.minimum(score_bias, own_block)
    row_query = query[:, first:last].flatten(0, 1).transpose(1, 2)
    context = nn.functional.scaled_dot_product_attention(row_query, keys, values, score_bias, scale=scaling)
    return context.transpose(1, 2).unflatten(0, (batch, -1))


def _causal_bias(block_size: int, device, dtype: torch.dtype, before: int = 0) -> Tensor:
    """What hides later tokens from those of a block: `[block, keys]`, the keys being those of `before` blocks before
    it and its own."""
    places = torch.arange(block_size, device=device) + before * block_size
    return additive_mask(causal_mask(places, (before + 1) * block_size), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Merged parts
# ---------------------------------------------------------------------------------------------------------------------


class _DensePart:
    """Some rows that all read the same blocks. `blocks` is None for all blocks of the document. With `is_causal` rows
    and blocks are the first ones, and each token reads those up to itself."""

    def __init__(self, rows, blocks=None, log_counts=None, is_causal=False):
        self.rows, self.blocks, self.log_counts = rows, slice(None) if blocks is None else blocks, log_counts
        self.is_causal = is_causal

    def queries(self, tensor):
        """`[batch, blocks, block, heads, dim]` -> `[n, heads, queries, dim]`: what each of n attentions asks."""
        return _as_sequence(tensor[:, self.rows])

    def keys(self, tensor):
        """`[batch, blocks, block, heads, dim]` -> `[n, heads, keys, dim]`: what each of n attentions reads."""
        return _as_sequence(tensor[:, self.blocks])

    def key_bias(self, mask_bias, block_size):
        """What is added to the scores, broadcastable to `[n, heads, queries, keys]`, or None."""
        bias = None
        if self.log_counts is not None:
            bias = self.log_counts.repeat_interleave(block_size)[None, None, None]
        if mask_bias is not None:
            masked = mask_bias.unflatten(1, (-1, block_size))[:, self.blocks].flatten(1)[:, None, None]
            bias = masked if bias is None else masked + bias
        return bias

    def log_sum_exps(self, tensor):
        """`queries` of the merged log-sum-exps `[batch, blocks, block, heads]`, to give to the backward."""
        return self.queries(tensor.unsqueeze(-1)).squeeze(-1)

    def to_rows(self, output, batch, block_size):
        """The transpose of `queries`: `[n, heads, queries, dim]` -> `[batch, rows, block, heads, dim]`."""
        return output.transpose(1, 2).unflatten(1, (-1, block_size))

    def add_to_blocks(self, grad, target):
        """The transpose of `keys`: adds `[n, heads, keys, dim]` to where it came from."""
        target[:, self.blocks] += grad.transpose(1, 2).unflatten(1, (-1, target.shape[2]))


class _GatheredPart(_DensePart):
    """Rows that read a list of blocks each: n is batch times rows."""

    def __init__(self, rows, lists, batch):
        super().__init__(slice(rows.start, rows.stop))
        self.lists, self.batch = lists, batch

    def queries(self, tensor):
        return tensor[:, self.rows].flatten(0, 1).transpose(1, 2)

    def keys(self, tensor):
        return self.lists.gather(tensor).flatten(0, 1)

    def key_bias(self, mask_bias, block_size):
        bias = self.lists.key_bias(mask_bias, block_size)
        return None if bias is None else bias.expand(self.batch, -1, -1, -1, -1).flatten(0, 1)

    def to_rows(self, output, batch, block_size):
        return output.transpose(1, 2).unflatten(0, (batch, -1))

    def add_to_blocks(self, grad, target):
        self.lists.scatter_add(grad.unflatten(0, (target.shape[0], -1)), target)


class _WindowPart(_DensePart):
    """Rows that read the blocks around them: so many `before` and `after` their own. All documents stand in one row of
    tokens, of which the windows are one strided view; n is the number of windows. Those across the border of two
    documents belong to rows that do not take part: what they give is left out. `own_block`, `[block, keys]`, is added
    to the scores of every window."""

    def __init__(self, rows, num_blocks, batch, before, after, own_block=None):
        super().__init__(slice(rows.start, rows.stop))
        self.row_count, self.num_blocks, self.before, self.after = len(rows), num_blocks, before, after
        self.first, self.last = rows.start, (batch - 1) * num_blocks + rows.stop
        self.own_block = own_block

    def queries(self, tensor):
        return tensor.flatten(0, 1)[self.first : self.last].transpose(1, 2)

    def keys(self, tensor):
        return self._windows(tensor.flatten(0, 2), tensor.shape[2]).transpose(-1, -2)

    def key_bias(self, mask_bias, block_size):
        own_block = None if self.own_block is None else self.own_block[None, None]
        if mask_bias is None:
            return own_block
        bias = self._windows(mask_bias.flatten(), block_size)[:, None, None]
        return bias if own_block is None else torch.minimum(bias, own_block)

    def log_sum_exps(self, tensor):
        rows = tensor.flatten(0, 1)[self.first : self.last]
        if tensor.shape[0] > 1:  # windows across a border: a huge log-sum-exp makes their probabilities zero
            index = torch.arange(self.first, self.last, device=tensor.device) % self.num_blocks
            across = (index < self.rows.start) | (index >= self.rows.stop)
            rows = rows.masked_fill(across[:, None, None], torch.finfo(rows.dtype).max)
        return rows.transpose(1, 2)

    def to_rows(self, output, batch, block_size):
        output = output.transpose(1, 2)
        shape = (batch, self.row_count, *output.shape[1:])
        return output.as_strided(shape, (self.num_blocks * output.stride(0), *output.stride()))

    def add_to_blocks(self, grad, target):
        block_size, blocks = target.shape[2], target.flatten(0, 1)
        for place, piece in enumerate(grad.split(block_size, dim=2)):
            start = self.first - self.before + place
            blocks[start : start + len(piece)] += piece.transpose(1, 2)

    def _windows(self, tokens, block_size):
        """`[tokens, ...]` -> `[windows, ..., window tokens]`."""
        start, stop = (self.first - self.before) * block_size, (self.last + self.after) * block_size
        return tokens[start:stop].unfold(0, (self.before + 1 + self.after) * block_size, block_size)


def _row_groups(pattern: BlockPattern | CausalPattern, query: Tensor) -> list[tuple[list | slice, list[_DensePart]]]:
    """The rows of the pattern, each in one group, with the parts that the rows of a group read."""
    if isinstance(pattern, CausalPattern):
        return _causal_row_groups(pattern, query)
    batch, device, dtype = query.shape[0], query.device, score_dtype(query)
    groups = []
    if pattern.global_blocks:
        groups.append((pattern.global_blocks, [_DensePart(pattern.global_blocks)]))
    inner = pattern.inner_rows
    if not inner:
        inner = range(pattern.last_row, pattern.last_row)
    for rows in (range(pattern.first_row, inner.start), range(inner.stop, pattern.last_row)):
        if rows:
            lists = _list_blocks(pattern, rows.start, rows.stop, device, dtype, structured=True)
            parts = [_GatheredPart(rows, lists, batch)]
            groups.append((slice(rows.start, rows.stop), parts))
    if inner:
        rows = slice(inner.start, inner.stop)
        parts = [_WindowPart(inner, pattern.num_blocks, batch, pattern.half_window, pattern.half_window)]
        if pattern.global_blocks:
            parts.append(_DensePart(rows, pattern.global_blocks, _global_log_counts(pattern, device, dtype)))
        if pattern.random_blocks is not None:
            lists = _list_blocks(pattern, inner.start, inner.stop, device, dtype, structured=False)
            parts.append(_GatheredPart(inner, lists, batch))
        groups.append((rows, parts))
    return groups


def _causal_row_groups(pattern: CausalPattern, query: Tensor) -> list[tuple[slice, list[_DensePart]]]:
    """The same for a decoder."""
    batch, device, dtype = query.shape[0], query.device, score_dtype(query)
    rows = range(pattern.first_sparse_row, pattern.num_blocks)
    full = slice(0, rows.start)
    groups = [(full, [_DensePart(full, full, is_causal=True)])]
    if rows:
        before = pattern.window - 1
        own_block = _causal_bias(query.shape[2], device, dtype, before)
        parts = [_WindowPart(rows, pattern.num_blocks, batch, before, 0, own_block)]
        if pattern.num_leading:
            parts.append(_DensePart(slice(rows.start, rows.stop), slice(0, pattern.num_leading)))
        if pattern.random_blocks is not None:
            lists = _list_blocks(pattern, rows.start, rows.stop, device, dtype, structured=False)
            parts.append(_GatheredPart(rows, lists, batch))
        groups.append((slice(rows.start, rows.stop), parts))
    return groups


def _global_log_counts(pattern: BlockPattern, device, dtype: torch.dtype) -> Tensor | None:
    """The logarithm of how many times the rows that are not global read each global block; None for once each."""
    if not pattern.first_block_extra:
        return None
    log_counts = torch.zeros(len(pattern.global_blocks), dtype=dtype, device=device)
    log_counts[0] = math.log1p(pattern.first_block_extra)
    return log_counts


class _MergedFlashAttention(torch.autograd.Function):
    """Block-sparse attention on `[batch, blocks, block, heads, dim]`, from flash attentions that are merged."""

    @staticmethod
    def forward(ctx, query, key, value, bias, pattern, scaling):
        batch, block_size = query.shape[0], query.shape[2]
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        log_sum_exp = torch.empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
        for rows, parts in _row_groups(pattern, query):
            merged = None
            for part in parts:
                out, lse = _flash(
                    part.queries(query),
                    part.keys(key),
                    part.keys(value),
                    is_causal=part.is_causal,
                    attn_mask=part.key_bias(bias, block_size),
                    scale=scaling,
                )
                result = (part.to_rows(t, batch, block_size) for t in (out, lse.unsqueeze(-1)))
                merged = tuple(result) if merged is None else _merge(*merged, *result)
            output[:, rows], log_sum_exp[:, rows] = merged[0], merged[1].squeeze(-1)
        ctx.save_for_backward(query, key, value, bias, output, log_sum_exp)
        ctx.pattern, ctx.scaling = pattern, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, bias, output, log_sum_exp = ctx.saved_tensors
        batch, block_size = query.shape[0], query.shape[2]
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_key, grad_value = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (key, value))
        for rows, parts in _row_groups(ctx.pattern, query):
            grad_rows = None
            for part in parts:
                grads = _flash_backward(
                    part.queries(grad_output),
                    part.queries(query),
                    part.keys(key),
                    part.keys(value),
                    part.queries(output),
                    part.log_sum_exps(log_sum_exp),
                    0.0,
                    part.is_causal,
                    attn_mask=part.key_bias(bias, block_size),
                    scale=ctx.scaling,
                )
                part_rows = part.to_rows(grads[0], batch, block_size)
                grad_rows = part_rows if grad_rows is None else grad_rows + part_rows
                part.add_to_blocks(grads[1], grad_key)
                part.add_to_blocks(grads[2], grad_value)
            grad_query[:, rows] = grad_rows
        return grad_query, grad_key, grad_value, None, None, None


def _merge(output: Tensor, log_sum_exp: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attentions over either, each with its log-sum-exp `[..., 1]`."""
    share = torch.sigmoid(other_lse - log_sum_exp)
    return torch.lerp(output, other, share.to(output.dtype)), torch.logaddexp(log_sum_exp, other_lse)
