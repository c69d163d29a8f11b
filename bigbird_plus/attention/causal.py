"""Sparse attention of decoders: a pass from the start, and pieces that go on where a cache ends.

A pass from the start is linear in the length; a piece costs what its own tokens read, however long the cache is.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import attend_linearly, cut, eager, masks, pad_to_blocks, sparse_engine
from .pattern import CausalPattern, Sparsity, count_blocks


class CausalInput(NamedTuple):
    """What all layers of a decoder have to know of an input that is read sparsely.

    sparsity: the settings of the pattern.
    places: `int64`, `[queries]`: places of the input's tokens among the keys.
    num_keys: keys to take notice of; a static cache has more while it is being filled from the start.
    from_start: whether the input has no past.
    offset: `int64`, `[batch]`: place of the first real token, from which blocks are counted; None for 0 throughout.
    key_mask: `bool`, `[batch, num_keys]`, False for padding; None where there is none behind the first real token.
    first_row, end_row: the input's tokens stand in blocks from the first up to the one before the end.
    """

    sparsity: Sparsity
    places: Tensor
    num_keys: int
    from_start: bool
    offset: Tensor | None
    key_mask: Tensor | None
    first_row: int
    end_row: int

    @property
    def num_blocks(self) -> int:
        """Blocks that the keys fill, the last of them perhaps in part."""
        return count_blocks(self.num_keys, self.sparsity.block_size)

    def is_real(self) -> Tensor | None:
        """`bool`, `[batch, queries]`: which of the input's tokens are not padding; None for all."""
        if self.key_mask is not None:
            return self.key_mask[:, self.places]
        return None if self.offset is None else self.places >= self.offset[:, None]


def make_causal_input(
    sparsity: Sparsity, attention_mask: Tensor | None, *, batch: int, places: Tensor, past: int | Tensor, keys: int
) -> CausalInput:
    """Of `[batch, queries]` tokens that stand at `places` (`[queries]`) among `keys` keys, `past` of them from a cache
    that may have free places; `attention_mask` as in `masks.decoder_key_mask`."""
    queries, block_size = places.shape[0], sparsity.block_size
    key_mask = masks.decoder_key_mask(attention_mask, batch=batch, query_positions=places, past=past, keys=keys)
    offset, most_padding = None, 0
    if key_mask is not None:
        offset = key_mask.to(torch.uint8).argmax(dim=-1)
        most_padding = keys
    is_known = isinstance(past, int)
    if key_mask is not None and is_known and masks.may_read_values(key_mask):
        most_padding = int(offset.max())
        if (offset + key_mask[:, : past + queries].sum(dim=-1) == past + queries).all():
            key_mask = None
        offset = offset if most_padding else None
    from_start = is_known and past == 0
    if from_start:
        keys = queries
        key_mask = None if key_mask is None else key_mask[:, :keys]
    first = max(past - most_padding, 0) // block_size if is_known else 0
    end = count_blocks(past + queries if is_known else keys, block_size)
    return CausalInput(sparsity, places, keys, from_start, offset, key_mask, first, end)


def attend_causally(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: CausalPattern,
    causal: CausalInput,
    *,
    scaling: float,
    implementation: str,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal block-sparse attention by an engine of ours: `"eager"`, or a linear one for every other name.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, heads, keys, head_dim]`: those of the cache, the input's own included.
        pattern: that of `causal.num_blocks` blocks.

    Returns:
        The context, `[batch, heads, queries, head_dim]`, zero for padding, and the probabilities, `[batch, heads,
        queries, keys]`, or None unless `output_attentions`.
    """
    context = probabilities = None
    if implementation == "eager" or output_attentions:
        context, probabilities = _attend_by_definition(query, key, value, pattern, causal, scaling)
    if implementation != "eager":
        attend = _attend_from_start if causal.from_start else _attend_to_cache
        context = attend(query, key, value, pattern, causal, scaling)
        is_real = causal.is_real()
        context = context if is_real is None else context.masked_fill(~is_real[:, None, :, None], 0)
    return context, probabilities if output_attentions else None


def _attend_by_definition(query, key, value, pattern, causal, scaling):
    """Free places of a static cache get probabilities, too: zeros."""
    free = key.shape[2] - causal.num_keys
    key_mask = causal.key_mask
    return eager.causal_attention(
        query,
        key,
        value,
        pattern,
        block_size=causal.sparsity.block_size,
        places=causal.places,
        offset=causal.offset,
        key_mask=key_mask if key_mask is None else nn.functional.pad(key_mask, (0, free)),
        scaling=scaling,
    )


# ---------------------------------------------------------------------------------------------------------------------
# A pass from the start
# ---------------------------------------------------------------------------------------------------------------------


def _attend_from_start(query, key, value, pattern, causal, scaling):
    """The linear engine counts blocks from the first place, so left padding is moved behind the tokens, and back.
    There no token reads it, nor what fills up the last block."""
    tensors = [query, *(tensor[:, :, : causal.num_keys] for tensor in (key, value))]
    key_mask, offset = causal.key_mask, causal.offset
    if offset is not None:
        tensors = [_rotate(tensor, offset, dim=2) for tensor in tensors]
        key_mask = None if key_mask is None else _rotate(key_mask, offset, dim=1)
    block_size = causal.sparsity.block_size
    tensors = [pad_to_blocks(tensor, block_size, 2) for tensor in tensors]
    key_mask = None if key_mask is None else pad_to_blocks(key_mask, block_size, 1)
    engine = sparse_engine("sdpa", *tensors, block_size=block_size)
    context = attend_linearly(*tensors, pattern, key_mask, engine=engine, block_size=block_size, scaling=scaling)
    context = cut(context, causal.num_keys, 2)
    return context if offset is None else _rotate(context, causal.num_keys - offset, dim=2)


def _rotate(tensor: Tensor, by: Tensor, dim: int) -> Tensor:
    """Each sequence of `tensor`, whose places are dimension `dim`, moved `by[sequence]` places to the front; what
    falls off comes in again at the end. None is moved by more places than there are."""
    length = tensor.shape[dim]
    source = torch.arange(length, device=tensor.device) + by[:, None] - length  # below 0: counted from the end
    sequence = torch.arange(by.shape[0], device=tensor.device)[:, None]
    return tensor.transpose(1, dim)[sequence, source].transpose(1, dim)


# ---------------------------------------------------------------------------------------------------------------------
# A piece
# ---------------------------------------------------------------------------------------------------------------------


def _attend_to_cache(query, key, value, pattern, causal, scaling):
    """Cuts the piece into the blocks in which its tokens stand, and gathers what each of them reads. A single token
    stands for its block."""
    batch, heads, queries, _ = query.shape
    block_size = causal.sparsity.block_size
    places = causal.places[None] if causal.offset is None else causal.places - causal.offset[:, None]
    width, count = (1, 1) if queries == 1 else (block_size, (queries - 2) // block_size + 2)
    first = places[:, :1] // width * width
    slots = (first + torch.arange(count * width, device=query.device)).unflatten(1, (count, width))

    tokens = _tokens_read(pattern, causal, slots[..., 0] // block_size, query.device)
    bias = _bias(tokens, slots, causal, key.shape[2], query.dtype)
    source = (slots.flatten(1) - places[:, :1]).clamp(0, queries - 1)
    rows = _take(query, source[:, None].expand(batch, heads, -1)).unflatten(2, (count, width)).transpose(1, 2)
    read = _to_cache_places(tokens, causal, key.shape[2]).transpose(1, 2).flatten(2).expand(batch, heads, -1)
    keys, values = (_take(tensor, read).unflatten(2, (count, -1)).transpose(1, 2) for tensor in (key, value))
    context = nn.functional.scaled_dot_product_attention(
        *(tensor.flatten(0, 1) for tensor in (rows, keys, values)),
        bias.expand(batch, -1, -1, -1, -1).flatten(0, 1),
        scale=scaling,
    )
    context = context.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)
    return _take(context, (places - first)[:, None].expand(batch, heads, -1))


def _tokens_read(pattern: CausalPattern, causal: CausalInput, rows: Tensor, device) -> Tensor:
    """The tokens of the blocks that some rows read, counted from the first real one.

    Args:
        rows: `int64`, `[batch or 1, n]`: blocks.

    Returns:
        `int64`, `[batch or 1, n, heads or 1, tokens]`; some may lie behind all that there are.
    """
    table = _block_table(pattern, causal.first_row, causal.end_row, device)
    blocks = table[(rows - causal.first_row).clamp(0, table.shape[0] - 1)]
    block_size = causal.sparsity.block_size
    return (blocks[..., None] * block_size + torch.arange(block_size, device=device)).flatten(-2)


def _block_table(pattern: CausalPattern, first: int, end: int, device) -> Tensor:
    """The blocks that each row from `first` to the one before `end` reads, `int64`, `[rows, heads or 1, blocks]`. Rows
    that read everything up to themselves list more than that: causality hides the rest."""
    num_full = min(max(pattern.num_full - first, 0), end - first)
    lists = pattern.lists(first + num_full, end).to(device)
    if not num_full:
        return lists
    full = torch.arange(pattern.num_full, device=device).expand(num_full, lists.shape[1], -1)
    lists = nn.functional.pad(lists, (0, pattern.num_full - lists.shape[2]), value=pattern.num_blocks)
    return torch.cat((full, lists))


def _bias(tokens: Tensor, slots: Tensor, causal: CausalInput, keys: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, `[batch or 1, n, heads or 1, width, tokens]`."""
    reads = tokens[..., None, :] <= slots[:, :, None, :, None]
    if causal.key_mask is not None:
        sequence = torch.arange(causal.key_mask.shape[0], device=tokens.device)[:, None, None, None]
        is_real = causal.key_mask[sequence, _to_cache_places(tokens, causal, keys)]
        reads = reads & is_real[..., None, :]
    return masks.additive_mask(reads, dtype)


def _to_cache_places(tokens: Tensor, causal: CausalInput, keys: int) -> Tensor:
    """Places in the cache of tokens that are counted from the first real one."""
    if causal.offset is not None:
        tokens = tokens + causal.offset[:, None, None, None]
    return tokens.clamp(max=keys - 1)


def _take(tensor: Tensor, places: Tensor) -> Tensor:
    """`[batch, heads, n, dim]`: of `[batch, heads, length, dim]` what stands at `places`, `[batch, heads, n]`."""
    batch, heads, length, dim = tensor.shape
    sequence = torch.arange(batch * heads, device=tensor.device).view(batch, heads, 1)
    taken = tensor.reshape(-1, dim).index_select(0, (sequence * length + places).flatten())
    return taken.view(batch, heads, -1, dim)
