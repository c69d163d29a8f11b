"""Attention within a long document that is read some blocks after others, as a layer does in inference.

Where no blocks are random, an inner row reads its window and the outer blocks. So the keys and values of the outer
blocks are kept, those of the others as long as windows reach them, and nothing grows with the document. The outer rows
read everything: what they get from each piece is merged, as the parts of a row are in `sdpa`.
"""

import torch
from torch import Tensor

from .eager import score_dtype
from .masks import additive_mask
from .pattern import BlockPattern
from .sdpa import flash_attention, merge, outer_log_counts


def is_streamable(pattern: BlockPattern) -> bool:
    """Whether the inner rows read nothing but their windows and the outer blocks."""
    return pattern.random_blocks is None and not pattern.middle_blocks


class AttentionStream:
    """Block-sparse attention of one document that comes in order: first the outer blocks, then the others.

    Those are to `read`, and then the rows whose windows were read can `attend`. When all have been read,
    `outer_context` gives the context of the outer blocks.

    Args:
        pattern: which block reads which; one that `is_streamable`.
        block_size: tokens in a block.
        query, key, value: of the outer blocks, `[1, heads, tokens, head_dim]`.
        key_mask: `bool`, `[1, length]`, False for padding; None where there is none.
        scaling: what the scores are multiplied by.
    """

    def __init__(self, pattern: BlockPattern, block_size: int, query, key, value, key_mask, *, scaling: float):
        self.pattern, self.block_size, self.scaling, self.key_mask = pattern, block_size, scaling, key_mask
        self.bias = None if key_mask is None else additive_mask(key_mask, score_dtype(query))[:, None, None]
        self.outer = query, key, value
        self.outer_bias = self._bias_of_outer_blocks(query)
        self.outer_result = None
        self.start = self.end = pattern.first_row  # of the blocks that are kept
        self.keys, self.values = key[:, :, :0], value[:, :, :0]
        if pattern.outer_blocks:
            self.outer_result = self._flash(query, key, value, self._of_outer_blocks(self.bias))

    def tokens(self, blocks: range, since: int = 0) -> slice:
        """Where the tokens of some blocks are, counted from those of the block `since`."""
        return slice((blocks.start - since) * self.block_size, (blocks.stop - since) * self.block_size)

    def blocks_before(self, rows: range) -> range:
        """The blocks to `read` before `rows` can `attend`."""
        return range(self.end, min(rows.stop + self.pattern.half_window, self.pattern.last_row))

    def read(self, key: Tensor, value: Tensor) -> None:
        """Takes keys and values of the next blocks, `[1, heads, tokens, head_dim]`."""
        end = self.end + key.shape[2] // self.block_size
        if self.outer_result is not None:
            bias = None if self.bias is None else self.bias[..., self.tokens(range(self.end, end))]
            merge(*self.outer_result, *self._flash(self.outer[0], key, value, bias))
        if self.start < self.end:
            key, value = torch.cat((self.keys, key), dim=2), torch.cat((self.values, value), dim=2)
        self.keys, self.values, self.end = key, value, end

    def attend(self, rows: range, query: Tensor) -> Tensor:
        """The context of some rows, of their queries: both `[1, heads, tokens, head_dim]`. Rows before them are done
        with."""
        parts = [(self.tokens(part, since=rows.start), part) for part in self._rows_of_equal_windows(rows)]
        windows = [self._attend_to_windows(part, query[:, :, tokens]) for tokens, part in parts]
        if self.pattern.outer_blocks:
            context, log_sum_exp = self._flash(query, *self.outer[1:], self.outer_bias)
            for (tokens, _), window in zip(parts, windows, strict=True):
                merge(context[:, tokens], log_sum_exp[:, tokens], *window)
        else:
            context = torch.cat([context for context, _ in windows], dim=1)
        self._forget(before=max(rows.stop - self.pattern.half_window, self.start))
        return self._finished(context, None if self.key_mask is None else self.key_mask[:, self.tokens(rows)])

    def outer_context(self) -> Tensor:
        """The context of the outer blocks, `[1, heads, tokens, head_dim]`."""
        if self.outer_result is None:
            return self.outer[0]
        return self._finished(self.outer_result[0], self._of_outer_blocks(self.key_mask))

    def _rows_of_equal_windows(self, rows: range) -> list[range]:
        """`rows`, cut so that within a part all windows have as many blocks before and behind a row."""
        whole = self.pattern.inner_rows
        whole = range(max(rows.start, whole.start), min(rows.stop, whole.stop))
        if not whole:
            return [range(row, row + 1) for row in rows]
        before, behind = range(rows.start, whole.start), range(whole.stop, rows.stop)
        return [*(range(row, row + 1) for row in before), whole, *(range(row, row + 1) for row in behind)]

    def _attend_to_windows(self, rows: range, query: Tensor) -> tuple[Tensor, Tensor]:
        """What rows with windows of equal form get from them. The windows are a view, nothing is copied for them."""
        half, pattern = self.pattern.half_window, self.pattern
        before, behind = min(half, rows.start - pattern.first_row), min(half, pattern.last_row - rows.stop)
        blocks = range(rows.start - before, rows.stop + behind)
        size = (before + 1 + behind) * self.block_size
        kept = self.tokens(blocks, since=self.start)
        key, value = (
            tensor[0, :, kept].unfold(1, size, self.block_size).permute(1, 0, 3, 2)
            for tensor in (self.keys, self.values)
        )
        bias = self.bias
        if bias is not None:
            bias = bias[0, ..., self.tokens(blocks)].unfold(-1, size, self.block_size).transpose(0, 2)
        query = query[0].unflatten(1, (len(rows), self.block_size)).transpose(0, 1)
        return tuple(tensor.flatten(0, 1)[None] for tensor in self._flash(query, key, value, bias))

    def _flash(self, query, key, value, bias) -> tuple[Tensor, Tensor]:
        """Of `[n, heads, tokens, head_dim]`: the context, `[n, tokens, heads, head_dim]`, and the log-sum-exp of the
        scores, `[n, tokens, heads, 1]`."""
        context, log_sum_exp = flash_attention(query, key, value, attn_mask=bias, scale=self.scaling)
        return context.transpose(1, 2), log_sum_exp.transpose(1, 2).unsqueeze(-1)

    def _forget(self, before: int) -> None:
        """Drops keys and values of earlier blocks."""
        kept = self.tokens(range(before, self.end), since=self.start)
        self.keys, self.values, self.start = self.keys[:, :, kept], self.values[:, :, kept], before

    def _of_outer_blocks(self, tensor: Tensor | None) -> Tensor | None:
        """Of `[..., length]` the places of the outer blocks."""
        if tensor is None:
            return None
        first, last = self.pattern.first_row * self.block_size, self.pattern.last_row * self.block_size
        return torch.cat((tensor[..., :first], tensor[..., last:]), dim=-1)

    def _bias_of_outer_blocks(self, query) -> Tensor | None:
        """What inner rows add to the scores of the outer blocks."""
        bias = self._of_outer_blocks(self.bias)
        log_counts = outer_log_counts(self.pattern, query.device, score_dtype(query))
        if log_counts is None:
            return bias
        log_counts = log_counts.repeat_interleave(self.block_size)[None, None, None]
        return log_counts if bias is None else bias + log_counts

    def _finished(self, context: Tensor, is_real: Tensor | None) -> Tensor:
        """From `[1, tokens, heads, head_dim]`; with zeros for padding."""
        if is_real is not None:
            context = context * is_real[..., None, None]
        return context.transpose(1, 2)
