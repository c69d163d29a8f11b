"""Block-sparse attention on a CPU: flash attentions over parts of the keys, merged.

torch's flash attention tells the log-sum-exp of its scores there, so the keys of a row are read in parts: with
outputs `o_p` and log-sum-exps `l_p`, `L = logsumexp(l_1, ..., l_p)` and `o = sum(o_p exp(l_p - L))`. The window is a
strided view of the keys, nothing is copied for it. The gradient of each part is that of flash attention itself, given
the merged `o` and `L` (as in ring attention, arXiv 2310.01889): the probabilities it recomputes from `L` are those of
the whole softmax. Masks hold the least finite number, never -inf: for a row of nothing but -inf that flash attention
returns a log-sum-exp of 0, which cannot be merged.

A long document can come some blocks after others: in order, if windows are all that they read (`Stream`), and nothing
grows with its length then; or all keys first (`KeysFirst`).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, pairwise

import torch
from torch import Tensor

from .. import ops
from ..block_lists import list_blocks, unread_bias
from ..common import (
    additive_mask,
    attention_dtype,
    causal_mask,
    chunks,
    is_exporting,
    is_transformed,
    merge,
    per_chunk,
    score_dtype,
)
from ..global_tokens import GlobalTokens, with_middle_blocks
from ..ops import Reading
from ..pattern import BlockPattern

NAME = "merged"

flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def reason(call) -> str | None:
    """Why it cannot run a call; None if it can."""
    if call.device.type != "cpu":
        return "only a CPU's flash attention tells the log-sum-exp of its scores"
    if is_exporting() or torch.jit.is_tracing():
        return "graphs that leave the process are made of torch's own operators"
    if is_transformed():
        return "transforms of torch.func take torch's own operators only"
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
    """The context of `reference.forward`, from the same arguments."""
    context = ops.attend(NAME, query, key, value, Reading(pattern, scaling, key_mask, global_tokens))
    return context if key_mask is None else context * key_mask[:, None, :, None]


def attend(query: Tensor, key: Tensor, value: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """Contexts, not yet zero for padding, and log-sum-exps, see `ops.Kernels`."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    log_sum_exp = torch.empty(query.shape[:-1], dtype=score_dtype(query))
    bias, tokens = _bias_and_tokens(query, reading)
    for documents, groups in _chunks(query, reading.pattern, tokens):
        inputs = _of(documents, query, key, value, dtype=attention_dtype(query)) + _of(documents, bias)
        written = _of(documents, output, log_sum_exp)
        for parts in groups:
            _attend(parts, reading.scaling, *written, *inputs)
    return output, log_sum_exp


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum_exp: Tensor, reading: Reading
) -> Tensor:
    """Those of queries, keys and values, see `ops.Kernels`."""
    dtype = attention_dtype(query)
    grads = query.new_empty(3, *query.shape, dtype=dtype)  # of queries: written; of keys and values: added up
    grads[1:] = 0
    bias, tokens = _bias_and_tokens(query, reading)
    elsewhere = _outside_of_global_tokens(log_sum_exp, tokens)
    for documents, groups in _chunks(query, reading.pattern, tokens):
        inputs = _of(documents, grad, query, key, value, dtype=dtype) + _of(documents, bias)
        inputs += _of(documents, output, dtype=dtype)
        for parts in groups:
            lse = log_sum_exp if isinstance(parts[0], _GlobalTokensPart) else elsewhere
            _add_gradients(parts, reading.scaling, _of(documents, *grads), lse[documents], inputs)
    return grads.to(query.dtype)


ops.KERNELS[NAME] = ops.Kernels(attend, gradients)


def _bias_and_tokens(query: Tensor, reading: Reading) -> tuple[Tensor | None, GlobalTokens | None]:
    """What is added to the scores of each key, `[batch, length]`, and the global tokens."""
    mask, bias = reading.key_mask, None
    if mask is not None and not mask.all():  # graphs bring a mask in any case
        bias = additive_mask(mask, score_dtype(query))
    return bias, with_middle_blocks(reading.global_tokens, reading.pattern, query.shape[0], query.device)


def _blocks(tensor: Tensor, pattern: BlockPattern) -> Tensor:
    """`[batch, tokens, ...]` as `[batch, blocks, block, ...]`, without the extra tokens: a view. Of a stream there are
    only some of the blocks."""
    size = pattern.block_size
    return tensor[:, : pattern.num_blocks * size].unflatten(1, (-1, size))


def _as_sequence(blocks: Tensor) -> Tensor:
    """`[batch, blocks, block, heads, dim]` as `[batch, heads, length, dim]`, without a copy."""
    return blocks.flatten(1, 2).transpose(1, 2)


def _causal_bias(pattern: BlockPattern, dtype: torch.dtype) -> Tensor:
    """What hides later tokens from those of a block: `[block, window]`, the window ending with the block."""
    size = pattern.block_size
    places = torch.arange(size) + pattern.before * size
    return additive_mask(causal_mask(places, pattern.window * size), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


class _DensePart:
    """Some rows, a slice or a list of them, that all read the same blocks. `blocks` is None for all tokens of the
    input. With `is_causal` rows and blocks are the first ones, and each token reads those up to itself.

    `origin` is the row with which the tensors of queries and outputs begin.
    """

    origin = 0

    def __init__(self, pattern, rows, blocks=None, log_counts=None, is_causal=False):
        self.pattern, self.rows, self.read, self.log_counts = pattern, rows, blocks, log_counts
        self.is_causal = is_causal

    def queries(self, tensor):
        """`[batch, tokens, heads, dim]` -> `[n, heads, queries, dim]`: what each of n attentions asks."""
        return _as_sequence(self._rows(tensor))

    def keys(self, tensor):
        """`[batch, tokens, heads, dim]` -> `[n, heads, keys, dim]`: what each of n attentions reads."""
        if self.read is None:
            return tensor.transpose(1, 2)
        return _as_sequence(_blocks(tensor, self.pattern)[:, self.read])

    def key_bias(self, mask_bias):
        """What is added to the scores, broadcastable to `[n, heads, queries, keys]`, or None."""
        bias = None
        if self.log_counts is not None:
            bias = self.log_counts.repeat_interleave(self.pattern.block_size)[None, None, None]
        if mask_bias is not None:
            if self.read is not None:
                mask_bias = _blocks(mask_bias, self.pattern)[:, self.read].flatten(1)
            bias = mask_bias[:, None, None] if bias is None else mask_bias[:, None, None] + bias
        return bias

    def log_sum_exps(self, tensor):
        """`queries` of the merged log-sum-exps `[batch, tokens, heads]`, to give to the backward."""
        return self.queries(tensor.unsqueeze(-1)).squeeze(-1)

    def to_rows(self, output):
        """The transpose of `queries`: `[n, heads, queries, dim]` -> `[batch, rows, block, heads, dim]`."""
        return output.transpose(1, 2).unflatten(1, (-1, self.pattern.block_size))

    def put(self, rows, target):
        """Writes what `to_rows` gives to where it belongs in `target`, `[batch, tokens, ...]`."""
        _blocks(target, self.pattern)[:, self._shifted()] = rows.to(target.dtype)

    def add(self, grad, target):
        """The transpose of `keys`: adds `[n, heads, keys, dim]` to where it came from."""
        grad = grad.transpose(1, 2)
        if self.read is None:
            target += grad
        else:
            _blocks(target, self.pattern)[:, self.read] += grad.unflatten(1, (-1, self.pattern.block_size))

    def _rows(self, tensor):
        """`[batch, tokens, ...]` -> `[batch, rows, block, ...]`."""
        return _blocks(tensor, self.pattern)[:, self._shifted()]

    def _shifted(self):
        if isinstance(self.rows, list):
            return self.rows
        return slice(self.rows.start - self.origin, self.rows.stop - self.origin)


class _GatheredPart(_DensePart):
    """Rows that read a list of blocks each: n is batch times rows."""

    def __init__(self, pattern, rows, lists, batch):
        super().__init__(pattern, slice(rows.start, rows.stop))
        self.lists, self.batch = lists, batch

    def queries(self, tensor):
        return self._rows(tensor).flatten(0, 1).transpose(1, 2)

    def keys(self, tensor):
        return self.lists.gather(_blocks(tensor, self.pattern))

    def key_bias(self, mask_bias):
        bias = self.lists.key_bias(mask_bias, self.pattern)
        return None if bias is None else bias.expand(self.batch, -1, -1, -1, -1).flatten(0, 1)

    def to_rows(self, output):
        return output.transpose(1, 2).unflatten(0, (self.batch, -1))

    def add(self, grad, target):
        self.lists.scatter_add(grad, _blocks(target, self.pattern))


class _WindowPart(_DensePart):
    """Rows that read the blocks around them. All documents stand in one row of tokens, of which the windows are one
    strided view; n is the number of windows. Those across the border of two documents belong to rows that do not take
    part: what they give is left out. `own_block`, `[block, keys]`, is added to the scores of every window."""

    def __init__(self, pattern, rows, batch, own_block=None):
        super().__init__(pattern, slice(rows.start, rows.stop))
        self.batch, self.own_block = batch, own_block
        self.first, self.last = rows.start, (batch - 1) * pattern.num_blocks + rows.stop

    def queries(self, tensor):
        return self._windows_rows(tensor).transpose(1, 2)

    def keys(self, tensor):
        return self._windows(tensor).transpose(-1, -2)

    def key_bias(self, mask_bias):
        own_block = None if self.own_block is None else self.own_block[None, None]
        if mask_bias is None:
            return own_block
        bias = self._windows(mask_bias)[:, None, None]
        return bias if own_block is None else torch.minimum(bias, own_block)

    def log_sum_exps(self, tensor):
        rows = self._windows_rows(tensor)
        if self.batch > 1:  # windows across a border: a huge log-sum-exp makes their probabilities zero
            index = torch.arange(self.first, self.last, device=tensor.device) % self.pattern.num_blocks
            across = (index < self.rows.start) | (index >= self.rows.stop)
            rows = rows.masked_fill(across[:, None, None], torch.finfo(rows.dtype).max)
        return rows.transpose(1, 2)

    def to_rows(self, output):
        output = output.transpose(1, 2)
        shape = (self.batch, self.rows.stop - self.rows.start, *output.shape[1:])
        return output.as_strided(shape, (self.pattern.num_blocks * output.stride(0), *output.stride()))

    def add(self, grad, target):
        blocks = _blocks(target, self.pattern)
        for place, piece in enumerate(grad.split(self.pattern.block_size, dim=2)):
            shift = place - self.pattern.before
            blocks[:, self.rows.start + shift : self.rows.stop + shift] += self.to_rows(piece)

    def _windows_rows(self, tensor):
        """`[batch, tokens, ...]` -> `[windows, block, ...]`."""
        return _blocks(tensor, self.pattern).flatten(0, 1)[self.first - self.origin : self.last - self.origin]

    def _windows(self, tensor):
        """`[batch, tokens, ...]` -> `[windows, ..., window tokens]`."""
        block_size = self.pattern.block_size
        first, last = self.first - self.pattern.before, self.last + self.pattern.after
        tokens = _blocks(tensor, self.pattern).flatten(0, 2)[first * block_size : last * block_size]
        return tokens.unfold(0, self.pattern.window * block_size, block_size)


class _UnreadTokensPart(_DensePart):
    """Rows that read those global tokens which they would not read otherwise."""

    def __init__(self, pattern, rows, tokens, dtype):
        super().__init__(pattern, slice(rows.start, rows.stop))
        self.tokens, self.dtype = tokens, dtype

    def keys(self, tensor):
        return self.tokens.take(tensor).transpose(1, 2)

    def key_bias(self, mask_bias):
        bias = unread_bias(self.pattern, self.rows.start, self.rows.stop, self.tokens, mask_bias, self.dtype)
        return bias.transpose(1, 2).repeat_interleave(self.pattern.block_size, dim=2)

    def add(self, grad, target):
        self.tokens.add(grad.transpose(1, 2), target)


class _GlobalTokensPart(_DensePart):
    """The global tokens, which read everything: n is batch."""

    def __init__(self, pattern, tokens):
        super().__init__(pattern, None)
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
        self.tokens.put(rows.to(target.dtype), target)


Group = list[_DensePart]
"""The parts that some rows read."""


def _row_groups(pattern: BlockPattern, query: Tensor, tokens: GlobalTokens | None, size: int) -> list[Group]:
    """The rows of the pattern, each in one group. Of the rows with windows, `size` make up a group."""
    groups = []
    if pattern.is_causal:
        full = slice(0, pattern.first_row)
        groups.append([_DensePart(pattern, full, full, is_causal=True)])
    elif pattern.outer_blocks:
        groups.append([_DensePart(pattern, pattern.outer_blocks)])
    sparse_rows = range(pattern.first_row, max(pattern.first_row, pattern.last_row))
    groups += _sparse_groups(pattern, query, sparse_rows, size)
    if tokens is not None:
        for parts in groups[bool(pattern.outer_blocks) :]:
            parts.append(_UnreadTokensPart(pattern, parts[0].rows, tokens, score_dtype(query)))
    return groups


def _sparse_groups(pattern: BlockPattern, query: Tensor, rows: range, size: int) -> Iterator[Group]:
    """The same of some rows, none of which reads everything."""
    inner = pattern.inner_rows
    inner = range(max(rows.start, inner.start), min(rows.stop, inner.stop))
    if not inner:
        inner = range(rows.stop, rows.stop)
    batch, dtype = query.shape[0], score_dtype(query)
    for ends in (range(rows.start, inner.start), range(inner.stop, rows.stop)):
        if ends:
            lists = list_blocks(pattern, ends.start, ends.stop, query.device, dtype)
            yield [_GatheredPart(pattern, ends, lists, batch)]
    own_block = _causal_bias(pattern, dtype) if pattern.is_causal else None
    for some in chunks(inner.start, inner.stop, size):
        parts: Group = [_WindowPart(pattern, some, batch, own_block)]
        if pattern.outer_blocks:
            where = slice(some.start, some.stop)
            parts.append(_DensePart(pattern, where, pattern.outer_blocks, _outer_log_counts(pattern, dtype)))
        if pattern.random_blocks is not None:
            lists = list_blocks(pattern, some.start, some.stop, query.device, dtype, structured=False)
            parts.append(_GatheredPart(pattern, some, lists, batch))
        yield parts


def _outer_log_counts(pattern: BlockPattern, dtype: torch.dtype) -> Tensor | None:
    """The logarithm of how many times the rows that are not global read each outer block; None for once each."""
    if not pattern.first_block_extra:
        return None
    log_counts = torch.zeros(len(pattern.outer_blocks), dtype=dtype)
    log_counts[0] = math.log1p(pattern.first_block_extra)
    return log_counts


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


def _chunks(query: Tensor, pattern: BlockPattern, tokens: GlobalTokens | None):
    """What is done at once, so that the memory that it takes is used again for the next: as slices of the documents of
    the batch, with the `_row_groups` of each. The global tokens come last: what they read as members of their blocks
    does not count."""
    batch, _, heads, dim = query.shape
    size = per_chunk(pattern.window * pattern.block_size * heads * dim * query.element_size())
    for share in chunks(0, batch, max(1, size // pattern.num_blocks)):
        documents = slice(share.start, share.stop)
        own = None if tokens is None else tokens.of_documents(documents)
        groups = _row_groups(pattern, query[documents], own, size)
        yield documents, groups if own is None else [*groups, [_GlobalTokensPart(pattern, own)]]


def _of(documents: slice, *tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [None if tensor is None else tensor[documents].to(dtype or tensor.dtype) for tensor in tensors]


def _outside_of_global_tokens(log_sum_exp: Tensor, tokens: GlobalTokens | None) -> Tensor:
    """`log_sum_exp`, `[batch, tokens, heads]`, but huge at the global tokens: their probabilities are zero then."""
    if tokens is None:
        return log_sum_exp
    elsewhere = log_sum_exp.clone()
    tokens.put(torch.full_like(tokens.take(elsewhere), torch.finfo(elsewhere.dtype).max), elsewhere)
    return elsewhere


def _attend(parts: Group, scaling: float, output, log_sum_exp, query, key, value, bias) -> None:
    """Writes to `output` and, if it is wanted, to `log_sum_exp` what comes to a group of rows."""
    first, *others = parts
    rows, lse = _attend_to(first, scaling, query, key, value, bias)
    for part in others:
        rows, lse = merge(rows, lse, *_attend_to(part, scaling, query, key, value, bias))
    first.put(rows, output)
    if log_sum_exp is not None:
        first.put(lse.squeeze(-1), log_sum_exp)


def _attend_to(part: _DensePart, scaling: float, query, key, value, bias) -> tuple[Tensor, Tensor]:
    """What comes to some rows from a part, and the log-sum-exps, `[..., 1]`."""
    output, log_sum_exp = flash_attention(
        part.queries(query),
        part.keys(key),
        part.keys(value),
        is_causal=part.is_causal,
        attn_mask=part.key_bias(bias),
        scale=scaling,
    )
    return part.to_rows(output), part.to_rows(log_sum_exp.unsqueeze(-1))


def _add_gradients(parts, scaling, grads, log_sum_exp, inputs) -> None:
    """What comes to queries, keys and values through a group of rows: written to the first of `grads`, added to the
    others. `inputs` are the gradient of the output, queries, keys, values, what is added to scores, and the output."""
    grad_output, query, key, value, bias, output = inputs
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


# ---------------------------------------------------------------------------------------------------------------------
# A long document, some blocks after others
# ---------------------------------------------------------------------------------------------------------------------


def is_streamable(pattern: BlockPattern) -> bool:
    """Whether rows that do not read everything read nothing but their windows and the outer blocks."""
    return pattern.random_blocks is None and not pattern.middle_blocks


class _Document:
    """Attention of one document in inference, to which queries come some rows after others.

    Args:
        pattern: which block reads which.
        key_mask: `bool`, `[1, length]`, False for padding; None where there is none.
        scaling: what the scores are multiplied by.
    """

    def __init__(self, pattern: BlockPattern, key_mask: Tensor | None, *, scaling: float):
        self.pattern, self.key_mask, self.scaling = pattern, key_mask, scaling

    def tokens(self, blocks: range) -> slice:
        """Where the tokens of some blocks are."""
        return slice(blocks.start * self.pattern.block_size, blocks.stop * self.pattern.block_size)

    def _bias(self, states: Tensor) -> Tensor | None:
        """What is added to the scores of each key, `[1, length]`."""
        return None if self.key_mask is None else additive_mask(self.key_mask, score_dtype(states))

    def _context(self, groups: Iterable[Group], origin: int, query, key, value, bias) -> Tensor:
        """Of groups of rows, in the shape of their queries, `[1, tokens, heads, head_dim]`, which begin with the row
        `origin`."""
        context = torch.empty_like(query)
        for parts in groups:
            for part in parts:
                part.origin = origin
            _attend(parts, self.scaling, context, None, query, key, value, bias)
        return context


def _finished(context: Tensor, is_real: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[1, heads, tokens, head_dim]` of `[1, tokens, heads, head_dim]`; with zeros for padding."""
    if is_real is not None:
        context = context * is_real[..., None, None]
    return context.transpose(1, 2).to(dtype)


class Stream(_Document):
    """Attention of one document, of which first the full rows come, then the others in order. Nothing grows with its
    length.

    Those are to `read`, and then the rows whose windows were read can `attend`. When all have been read,
    `full_context` gives the context of the full rows: what an encoder's get from each piece is merged. Of the others
    only keys and values that windows still reach are kept.

    Args:
        pattern: which block reads which; one that `is_streamable`.
        query, key, value: of the full rows, `[1, heads, tokens, head_dim]`.
        key_mask, scaling: see `_Document`.
    """

    def __init__(self, pattern: BlockPattern, query, key, value, key_mask, *, scaling: float):
        super().__init__(pattern, key_mask, scaling=scaling)
        self.bias, self.dtype = self._bias(query), query.dtype
        self.query, key, value = (tensor.to(attention_dtype(tensor)) for tensor in (query, key, value))
        self.full_result = None
        if pattern.full_rows:
            bias = None if self.bias is None else self._of_full_rows(self.bias)
            self.full_result = self._of_keys(key, value, bias, is_causal=pattern.is_causal)
        full = [tensor.transpose(1, 2) for tensor in (key, value)]
        self.start = self.end = pattern.first_row  # of the blocks that are kept
        if pattern.is_causal:  # windows reach into the full rows
            self.start = max(0, self.end - pattern.before)
        self.kept = [tensor[:, self.tokens(range(self.start, self.end))] for tensor in full]
        self.ends = [tensor[:, self.tokens(range(len(pattern.outer_blocks)))] for tensor in full]

    def blocks_before(self, rows: range) -> range:
        """The blocks to `read` before `rows` can `attend`."""
        return range(self.end, min(rows.stop + self.pattern.after, self.pattern.last_row))

    def read(self, key: Tensor, value: Tensor) -> None:
        """Takes keys and values of the next blocks, `[1, heads, tokens, head_dim]`."""
        key, value = key.to(self.query.dtype), value.to(self.query.dtype)
        end = self.end + key.shape[2] // self.pattern.block_size
        if self.full_result is not None and not self.pattern.is_causal:
            bias = None if self.bias is None else self.bias[:, self.tokens(range(self.end, end))]
            merge(*self.full_result, *self._of_keys(key, value, bias))
        new = (tensor.transpose(1, 2) for tensor in (key, value))
        self.kept = [torch.cat(pair, dim=1) for pair in zip(self.kept, new, strict=True)]
        self.end = end

    def attend(self, rows: range, query: Tensor) -> Tensor:
        """The context of some rows, of their queries: both `[1, heads, tokens, head_dim]`. Rows before them are done
        with."""
        pattern, query = self.pattern, query.to(self.query.dtype).transpose(1, 2)
        near = replace(pattern, num_blocks=self.end - self.start + len(pattern.outer_blocks), num_full=0)
        shift = pattern.num_leading - self.start
        key, value = (self._between_ends(*pair) for pair in zip(self.ends, self.kept, strict=True))
        bias = None
        if self.bias is not None:
            outer_bias = self._outside_of(range(pattern.num_leading, pattern.last_row), self.bias)
            bias = self._between_ends(outer_bias, self.bias[:, self.tokens(range(self.start, self.end))])
        own_rows = range(rows.start + shift, rows.stop + shift)
        groups = _sparse_groups(near, query, own_rows, len(rows))
        context = self._context(groups, own_rows.start, query, key, value, bias)
        self._forget(before=max(rows.stop - pattern.before, self.start))
        return _finished(context, None if self.key_mask is None else self.key_mask[:, self.tokens(rows)], self.dtype)

    def full_context(self) -> Tensor:
        """The context of the full rows, `[1, heads, tokens, head_dim]`."""
        if self.full_result is None:
            return self.query.to(self.dtype)
        is_real = None if self.key_mask is None else self._of_full_rows(self.key_mask)
        return _finished(self.full_result[0], is_real, self.dtype)

    def _of_keys(self, key, value, bias, is_causal=False) -> tuple[Tensor, Tensor]:
        """What the full rows get from some keys, `[1, tokens, heads, head_dim]`, with log-sum-exps."""
        bias = None if bias is None else bias[:, None, None]
        kwargs = {"is_causal": is_causal, "attn_mask": bias, "scale": self.scaling}
        context, log_sum_exp = flash_attention(self.query, key, value, **kwargs)
        return context.transpose(1, 2), log_sum_exp.transpose(1, 2).unsqueeze(-1)

    def _between_ends(self, ends: Tensor, kept: Tensor) -> Tensor:
        """`[1, tokens, ...]`: what is kept, between the outer blocks."""
        first = self.pattern.num_leading * self.pattern.block_size
        return torch.cat((ends[:, :first], kept, ends[:, first:]), dim=1)

    def _of_full_rows(self, tensor: Tensor) -> Tensor:
        """Of `[1, length]` the places of the full rows."""
        return self._outside_of(range(self.pattern.first_row, self.pattern.last_row), tensor)

    def _outside_of(self, blocks: range, tensor: Tensor) -> Tensor:
        """`[1, length]` without the places of some blocks."""
        inner = self.tokens(blocks)
        return torch.cat((tensor[:, : inner.start], tensor[:, inner.stop :]), dim=1)

    def _forget(self, before: int) -> None:
        """Drops keys and values of earlier blocks."""
        gone = (before - self.start) * self.pattern.block_size
        self.kept, self.start = [tensor[:, gone:] for tensor in self.kept], before


class KeysFirst(_Document):
    """Attention of one document, of which all keys and values are there. Rows can `attend`, whatever they read.

    Args:
        pattern: which block reads which.
        key, value: `[1, tokens of its blocks or more, heads, head_dim]`.
        key_mask, scaling: see `_Document`.
    """

    def __init__(self, pattern: BlockPattern, key: Tensor, value: Tensor, key_mask: Tensor | None, *, scaling: float):
        super().__init__(pattern, key_mask, scaling=scaling)
        own = self.tokens(range(pattern.num_blocks))
        self.keys = [tensor[:, own].to(attention_dtype(tensor)) for tensor in (key, value)]
        self.bias = self._bias(key)

    def runs(self, size: int) -> list[range]:
        """All rows, so many together. Full rows are apart."""
        pattern = self.pattern
        full = [range(pattern.first_row), *(range(block, block + 1) for block in sorted(pattern.middle_blocks))]
        full.append(range(pattern.last_row, pattern.num_blocks))
        others = [chunks(before.stop, after.start, size) for before, after in pairwise(full)]
        return [rows for rows in (*full, *chain.from_iterable(others)) if rows]

    def attend(self, rows: range, query: Tensor) -> Tensor:
        """The context of one of the `runs`, of its queries: both `[1, heads, tokens, head_dim]`."""
        dtype, (key, value) = query.dtype, self.keys
        query = query.to(key.dtype).transpose(1, 2)
        context = self._context(self._groups(rows, query), rows.start, query, key, value, self.bias)
        return _finished(context, None if self.key_mask is None else self.key_mask[:, self.tokens(rows)], dtype)

    def _groups(self, rows: range, query: Tensor) -> Iterator[Group]:
        pattern = self.pattern
        if rows.start in pattern.full_rows:
            own = slice(rows.start, rows.stop)
            yield [_DensePart(pattern, own, own if pattern.is_causal else None, is_causal=pattern.is_causal)]
            return
        tokens = with_middle_blocks(None, pattern, 1, query.device)
        for parts in _sparse_groups(pattern, query, rows, len(rows)):
            if tokens is not None:
                parts.append(_UnreadTokensPart(pattern, parts[0].rows, tokens, score_dtype(query)))
            yield parts
