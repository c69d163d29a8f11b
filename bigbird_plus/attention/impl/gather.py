"""Block-sparse attention by gathering the blocks that each row reads, for torch's `scaled_dot_product_attention`.

Runs on every device, in graphs that leave the process, and for decoders that go on where a cache ends. Time and memory
are linear in the length; a piece of a decoder's text costs what its own tokens read, however long the cache is.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..block_lists import blocks_of, join, list_blocks, unread_bias
from ..common import additive_mask, causal_mask
from ..global_tokens import GlobalTokens, with_middle_blocks
from ..pattern import BlockPattern


def reason(call) -> str | None:
    """Why it cannot run a call: never."""
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
    bias = None if key_mask is None else additive_mask(key_mask, query.dtype)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if pattern.is_causal:
        context = _attend_causally(query, key, value, bias, pattern, scaling)
    else:
        global_tokens = with_middle_blocks(global_tokens, pattern, query.shape[0], query.device)
        context = _attend(query, key, value, bias, pattern, global_tokens, scaling)
    if key_mask is not None:
        context = context * key_mask[:, :, None, None]
    return context.transpose(1, 2)


def _attend(query, key, value, bias, pattern, global_tokens, scaling) -> Tensor:
    """Block-sparse attention on `[batch, tokens, heads, dim]`."""
    first, last = pattern.first_row, pattern.last_row
    inner = _attend_to_lists((query, key, value), bias, pattern, (first, last), scaling, tokens=global_tokens)
    blocks = blocks_of(query, pattern)
    readers_of_all = [blocks[:, :first].flatten(1, 2), blocks[:, last:].flatten(1, 2)]
    if global_tokens is not None:
        readers_of_all.append(global_tokens.take(query))
    elif not pattern.num_leading + pattern.num_trailing:
        return join(inner, 1)
    outer_query = torch.cat(readers_of_all, dim=1).transpose(1, 2)
    outer_bias = None if bias is None else bias[:, None, None]
    attend = nn.functional.scaled_dot_product_attention
    outer = attend(outer_query, key.transpose(1, 2), value.transpose(1, 2), outer_bias, scale=scaling)
    leading, trailing, *chosen = outer.transpose(1, 2).split([part.shape[1] for part in readers_of_all], dim=1)
    context = torch.cat((leading, join(inner, 1), trailing), dim=1)
    if global_tokens is None:
        return context
    context = nn.functional.pad(context, (0, 0, 0, 0, 0, global_tokens.num_extra))
    global_tokens.put(*chosen, context)
    return context


def _attend_causally(query, key, value, bias, pattern, scaling) -> Tensor:
    """The same for a decoder, from its first token on."""
    block_size, first = pattern.block_size, pattern.first_row
    full_bias = _causal_bias(first * block_size, query.device, query.dtype)
    if bias is not None:
        full_bias = torch.minimum(full_bias, bias[:, None, None, : full_bias.shape[0]])
    asked, keys, values = (tensor[:, : first * block_size].transpose(1, 2) for tensor in (query, key, value))
    full = nn.functional.scaled_dot_product_attention(asked, keys, values, full_bias, scale=scaling).transpose(1, 2)
    if first == pattern.num_blocks:
        return full
    window = _causal_bias(block_size, query.device, query.dtype, before=pattern.before)
    listed = (pattern.num_leading, pattern.random_blocks.shape[2] if pattern.random_blocks is not None else 0)
    own_block = nn.functional.pad(window, [blocks * block_size for blocks in listed])
    # One row more than needed, which is left out again: of a free number of rows, torch asks whether it is 1.
    rows = (first - 1, pattern.num_blocks)
    sparse = _attend_to_lists((query, key, value), bias, pattern, rows, scaling, own_block=own_block)
    return torch.cat((full, join(sparse, 1)[:, block_size:]), dim=1)


def _attend_to_lists(
    tensors, bias, pattern, rows, scaling, *, own_block=None, tokens: GlobalTokens | None = None
) -> Tensor:
    """What the rows from the first of `rows` to the second read of `tensors`, query, key and value, gathered:
    `[batch, rows, block, heads, dim]`. `own_block`, `[block, keys]`, is added to the scores of each row; `tokens` are
    the global ones, which they read besides."""
    query, key, value = tensors
    batch, block_size, (first, last) = query.shape[0], pattern.block_size, rows
    lists = list_blocks(pattern, first, last, query.device, query.dtype)
    keys, values = (lists.gather(blocks_of(tensor, pattern)) for tensor in (key, value))
    score_bias = lists.key_bias(bias, pattern)
    if tokens is not None:
        unread = unread_bias(pattern, first, last, tokens, bias, query.dtype)[:, :, :, None]
        if score_bias is None:
            score_bias = unread.new_zeros(*unread.shape[:4], keys.shape[2])
        score_bias = torch.cat((score_bias.expand(batch, -1, -1, -1, -1), unread), dim=-1)
        chosen = (tokens.take(tensor).transpose(1, 2)[:, None] for tensor in (key, value))
        keys, values = (
            torch.cat((tensor, join(more.expand(-1, last - first, -1, -1, -1), 0)), dim=2)
            for tensor, more in zip((keys, values), chosen, strict=True)
        )
    if score_bias is not None:
        score_bias = score_bias + score_bias.new_zeros(batch, 1, 1, 1, 1)  # `expand` would copy it later, or not
        score_bias = join(score_bias, 0).expand(-1, -1, block_size, -1)
    if own_block is not None:
        score_bias = own_block if score_bias is None else torch.minimum(score_bias, own_block)
    index = torch.arange(first, last, device=query.device)  # of a slice, torch asks whether the batch is 1
    row_query = join(blocks_of(query, pattern).index_select(1, index), 0).transpose(1, 2)
    context = nn.functional.scaled_dot_product_attention(row_query, keys, values, score_bias, scale=scaling)
    return context.transpose(1, 2).unflatten(0, (batch, last - first))


def _causal_bias(block_size: int, device, dtype: torch.dtype, before: int = 0) -> Tensor:
    """What hides later tokens from those of a block: `[block, keys]`, the keys being those of `before` blocks before
    it and its own."""
    places = torch.arange(block_size, device=device) + before * block_size
    return additive_mask(causal_mask(places, (before + 1) * block_size), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# A piece of a decoder's text, which goes on where a cache ends
# ---------------------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Where the tokens of a piece stand.

    positions: `int64`, `[queries]`: places among the keys.
    offset: `int64`, `[batch]`: place of the first real token of each sequence; None where it is 0 throughout.
    first_row, end_row: the tokens of all sequences stand in the blocks from the first up to the one before the end,
        counted from the first real token.
    """

    positions: Tensor
    offset: Tensor | None
    first_row: int
    end_row: int


def attend_to_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    key_mask: Tensor | None,
    piece: Piece,
    *,
    scaling: float,
) -> Tensor:
    """The context of `reference.causal_attention`, from the same tensors, but with any values for padding.

    Cuts the piece into the blocks in which its tokens stand, and gathers what each of them reads. A single token
    stands for its block.
    """
    batch, heads, queries, _ = query.shape
    places = piece.positions[None] if piece.offset is None else piece.positions - piece.offset[:, None]
    width, count = (1, 1) if queries == 1 else (pattern.block_size, (queries - 2) // pattern.block_size + 2)
    first = places[:, :1] // width * width
    slots = (first + torch.arange(count * width, device=query.device)).unflatten(1, (count, width))
    tokens = _tokens_read(pattern, piece, slots[..., 0] // pattern.block_size)
    cached = tokens if piece.offset is None else tokens + piece.offset[:, None, None, None]
    cached = cached.clamp(max=key.shape[2] - 1)
    bias = _piece_bias(tokens, slots, cached, key_mask, query.dtype).expand(batch, -1, -1, -1, -1)

    source = (slots.flatten(1) - places[:, :1]).clamp(0, queries - 1)
    asked = _take(query, source[:, None].expand(batch, heads, -1)).unflatten(2, (count, width)).transpose(1, 2)
    read = cached.transpose(1, 2).flatten(2).expand(batch, heads, -1)
    keys, values = (_take(tensor, read).unflatten(2, (count, -1)).transpose(1, 2) for tensor in (key, value))
    asked, keys, values, bias = (tensor.flatten(0, 1) for tensor in (asked, keys, values, bias))
    context = nn.functional.scaled_dot_product_attention(asked, keys, values, bias, scale=scaling)
    context = context.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)
    return _take(context, (places - first)[:, None].expand(batch, heads, -1))


def _piece_bias(tokens: Tensor, slots: Tensor, cached: Tensor, key_mask: Tensor | None, dtype) -> Tensor:
    """What is added to the scores, `[batch or 1, n, heads or 1, width, tokens]`."""
    reads = tokens[..., None, :] <= slots[:, :, None, :, None]
    if key_mask is not None:
        sequence = torch.arange(key_mask.shape[0], device=tokens.device)[:, None, None, None]
        reads = reads & key_mask[sequence, cached][..., None, :]
    return additive_mask(reads, dtype)


def _tokens_read(pattern: BlockPattern, piece: Piece, rows: Tensor) -> Tensor:
    """The tokens of the blocks that `rows`, `int64`, `[batch or 1, n]`, read, counted from the first real one:
    `int64`, `[batch or 1, n, heads or 1, tokens]`; some may lie behind all that there are."""
    table = _table(pattern, piece.first_row, piece.end_row).to(rows.device)
    blocks = table[(rows - piece.first_row).clamp(0, table.shape[0] - 1)]
    return (blocks[..., None] * pattern.block_size + torch.arange(pattern.block_size, device=rows.device)).flatten(-2)


def _table(pattern: BlockPattern, first: int, end: int) -> Tensor:
    """The blocks that each row from `first` to the one before `end` reads, `int64`, `[rows, heads or 1, blocks]`. Rows
    that read everything up to themselves list more than that: causality hides the rest."""
    num_full = min(max(pattern.num_full - first, 0), end - first)
    lists = pattern.lists(first + num_full, end)
    if not num_full:
        return lists
    full = torch.arange(pattern.num_full).expand(num_full, lists.shape[1], -1)
    lists = nn.functional.pad(lists, (0, pattern.num_full - lists.shape[2]), value=pattern.num_blocks)
    return torch.cat((full, lists))


def _take(tensor: Tensor, places: Tensor) -> Tensor:
    """`[batch, heads, n, dim]`: of `[batch, heads, length, dim]` what stands at `places`, `[batch, heads, n]`."""
    batch, heads, length, dim = tensor.shape
    sequence = torch.arange(batch * heads, device=tensor.device).view(batch, heads, 1)
    taken = tensor.reshape(-1, dim).index_select(0, (sequence * length + places).flatten())
    return taken.view(batch, heads, -1, dim)
