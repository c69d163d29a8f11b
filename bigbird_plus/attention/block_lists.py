"""The blocks that some rows of a pattern read, as indices: to gather them, and to add gradients back."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .common import additive_mask, has_free_shapes
from .global_tokens import GlobalTokens
from .pattern import BlockPattern
from .random_blocks import NO_BLOCK


def blocks_of(tensor: Tensor, pattern: BlockPattern) -> Tensor:
    """`[batch, tokens, ...]` as `[batch, blocks, block, ...]`, without the extra tokens: a view, of which blocks, runs
    of blocks and windows of blocks are views."""
    num_blocks, block_size = pattern.num_blocks, pattern.block_size
    return tensor[:, : num_blocks * block_size].unflatten(1, (num_blocks, block_size))


class BlockLists(NamedTuple):
    """What some rows read, as indices into the blocks of a document.

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
            return join(tensor[:, self.blocks[:, 0]].flatten(2, 3), 0).transpose(1, 2)
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

    def key_bias(self, mask_bias: Tensor | None, pattern: BlockPattern) -> Tensor | None:
        """What is added to the scores of the gathered keys, broadcastable to `[batch, rows, heads, queries, keys]`."""
        bias = None
        if self.bias is not None:
            bias = self.bias.repeat_interleave(pattern.block_size, dim=-1)[None, :, :, None]
        if mask_bias is not None:
            masked = blocks_of(mask_bias, pattern)[:, self.blocks].flatten(3, 4)[:, :, :, None]
            bias = masked if bias is None else (bias + masked).clamp(min=torch.finfo(bias.dtype).min)
        return bias


def list_blocks(
    pattern: BlockPattern, first: int, last: int, device, dtype: torch.dtype, *, structured: bool = True
) -> BlockLists:
    """`pattern.lists`, to gather them."""
    lists = pattern.lists(first, last, structured=structured)
    empty = lists == NO_BLOCK
    bias = additive_mask(~empty, dtype)
    if structured and pattern.first_block_extra:
        bias[..., 0] = math.log1p(pattern.first_block_extra)
    is_needed = has_free_shapes() or bias.any()
    return BlockLists(lists.masked_fill(empty, 0).to(device), bias.to(device) if is_needed else None)


def unread_bias(
    pattern: BlockPattern, first: int, last: int, tokens: GlobalTokens, mask_bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What the rows from `first` to `last` add to the scores of the global tokens, `[batch, rows, heads or 1,
    tokens]`: 0 for those that they would not read otherwise, the least finite number for others and for padding."""
    block = (tokens.places // pattern.block_size)[:, None, None]
    lists = pattern.lists(first, last).to(block.device)
    unread = torch.ones_like(block, dtype=torch.bool)
    for listed in lists.unbind(-1):
        unread = unread & (block != listed[None, :, :, None])
    if tokens.is_token is not None:
        unread = unread & tokens.is_token[:, None, None]
    bias = additive_mask(unread, dtype)
    return bias if mask_bias is None else torch.minimum(bias, tokens.take(mask_bias)[:, None, None])


def join(tensor: Tensor, dim: int) -> Tensor:
    """`tensor` with a dimension and the next one as one."""
    first, second = tensor.shape[dim : dim + 2]
    return _reshape(tensor, *tensor.shape[:dim], first * second, *tensor.shape[dim + 2 :], leading=dim + 1)


def _reshape(tensor: Tensor, *shape: int, leading: int = 1) -> Tensor:
    """`tensor.reshape(shape)`. While a graph is traced, by way of a vector, and of a matrix whose rows are so many
    `leading` dimensions: to join dimensions of sizes `m` and `b` directly, torch asks whether `m % (m b)` is 0, to
    which it knows no answer for a free length."""
    if not has_free_shapes():
        return tensor.reshape(shape)
    return tensor.reshape(-1).view(math.prod(shape[:leading]), math.prod(shape[leading:])).view(shape)
