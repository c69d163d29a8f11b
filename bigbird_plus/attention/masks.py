"""Masks of full attention, from what users pass to what attention functions add to their scores."""

from typing import NamedTuple

import torch
from torch import Tensor

from .common import additive_mask, causal_mask, may_read_values


def padding_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """A user's `[batch, length]` mask as `bool` (True: a real token), or None where nothing is known to be padding.

    Raises:
        ValueError: if the mask has another shape.
    """
    if attention_mask is None:
        return None
    _check_shape("attention_mask", attention_mask, batch, length)
    mask = attention_mask != 0
    return None if may_read_values(mask) and mask.all() else mask


def as_global_mask(global_attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """A user's `[batch, length]` choice of global tokens as `bool`, or None for none.

    Raises:
        ValueError: if it has another shape.
    """
    if global_attention_mask is None:
        return None
    _check_shape("global_attention_mask", global_attention_mask, batch, length)
    return global_attention_mask != 0


def _check_shape(name: str, mask: Tensor, batch: int, length: int) -> None:
    if mask.shape != (batch, length):
        raise ValueError(
            f"{name} must have the shape [batch, length] = [{batch}, {length}], but has {list(mask.shape)}."
        )


def with_extra_tokens(attention_mask: Tensor | None, count: int) -> Tensor | None:
    """A mask of 2 to 4 dimensions, see `expand_mask`, for an input with so many more tokens at its end, which read
    everything and are read by all."""
    if attention_mask is None or not count:
        return attention_mask
    read = 0 if attention_mask.dim() == 4 and attention_mask.is_floating_point() else 1
    more_queries = (0, count) if attention_mask.dim() > 2 and attention_mask.shape[-2] > 1 else (0, 0)
    return torch.nn.functional.pad(attention_mask, (0, count, *more_queries), value=read)


class FullMask(NamedTuple):
    """What full attention has to know of its keys.

    added: what is added to the scores, broadcastable to `[batch, heads, queries, keys]`; `[batch, keys]` for the flash
        attention of other packages; None where the attention function needs no telling.
    reads_nothing: `bool`, broadcastable to `[batch, heads, queries, 1]`: queries to which every key is hidden; None
        where there are known to be none.
    """

    added: Tensor | None = None
    reads_nothing: Tensor | None = None


NO_MASK = FullMask()


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of queries and keys made of states of a dtype: another one under autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


class ScoreShape(NamedTuple):
    """That of the scores which a mask is added to."""

    batch: int
    heads: int
    queries: int
    keys: int


def full_attention_mask(
    attention_mask: Tensor | None,
    shape: ScoreShape,
    *,
    query_positions: Tensor,
    past: int | Tensor,
    is_causal: bool,
    dtype: torch.dtype,
    implementation: str,
) -> FullMask:
    """The mask of full self-attention.

    Args:
        attention_mask: the user's, see `expand_mask`.
        shape: that of the scores; free places of a static cache are keys, too.
        query_positions: `int64`, `[queries]`: places of the queries among the keys.
        past: number of tokens that a cache already holds.
        is_causal: whether later keys are hidden. A 4-D mask is taken to say so itself.
        dtype: the queries'.
        implementation: name of the attention function.

    Raises:
        ValueError: if the mask does not fit.
    """
    queries, keys = shape.queries, shape.keys
    if attention_mask is not None and attention_mask.dim() == 2:
        _check_covers_keys(attention_mask, shape.batch, past, queries, is_causal)
        attention_mask = attention_mask != 0
        if may_read_values(attention_mask) and attention_mask.all():
            attention_mask = None
    if passes_masks_unexpanded(implementation):
        return FullMask(_unexpanded(attention_mask, keys))
    if attention_mask is None:
        from_start = isinstance(past, int) and past == 0 and keys == queries and _is_causal_itself(implementation)
        last_only = isinstance(past, int) and queries == 1 and keys == past + 1
        if not is_causal or from_start or last_only:
            return NO_MASK
        expanded = causal_mask(query_positions, keys)[None, None]
    else:
        expanded = expand_mask(attention_mask, shape, may_end_elsewhere=is_causal)
        if is_causal and attention_mask.dim() < 4:
            expanded = expanded & causal_mask(query_positions, keys)
    return _to_be_added(expanded, dtype, implementation, shape)


def cross_attention_mask(
    attention_mask: Tensor | None, shape: ScoreShape, *, dtype: torch.dtype, implementation: str
) -> FullMask:
    """The mask of attention to an encoder's states; arguments as in `full_attention_mask`."""
    name = "encoder_attention_mask"
    if attention_mask is None:
        return NO_MASK
    if attention_mask.dim() == 2 and attention_mask.shape[-1] != shape.keys:
        raise ValueError(
            f"{name} is for {attention_mask.shape[-1]} tokens, but encoder_hidden_states has {shape.keys}."
        )
    if may_read_values(attention_mask) and attention_mask.dim() == 2 and (attention_mask != 0).all():
        return NO_MASK
    if passes_masks_unexpanded(implementation):
        return FullMask(_unexpanded(attention_mask, shape.keys))
    return _to_be_added(expand_mask(attention_mask, shape, name), dtype, implementation, shape)


def key_mask_of(key_mask: Tensor, dtype: torch.dtype, implementation: str) -> FullMask:
    """The mask of full attention that hides padding alone; `key_mask` is `bool`, `[batch, keys]`."""
    if passes_masks_unexpanded(implementation):
        return FullMask(key_mask)
    name = "eager" if implementation == "eager" else "sdpa"
    shape = ScoreShape(batch=key_mask.shape[0], heads=1, queries=1, keys=key_mask.shape[1])
    return _to_be_added(key_mask[:, None, None], dtype, name, shape)


def _to_be_added(expanded, dtype, implementation, shape: ScoreShape) -> FullMask:
    """Numbers stay as they are, but finite. Only eager and sdpa attention take what is broadcastable to `shape`."""
    if implementation == "eager":
        dtype = torch.promote_types(dtype, torch.float32)  # that of its scores
    least = torch.finfo(dtype).min
    if expanded.is_floating_point():
        added = expanded.clamp(min=least).to(dtype)
        hidden = added == least
    else:
        added, hidden = additive_mask(expanded, dtype), ~expanded
    reads_nothing = hidden.all(dim=-1, keepdim=True)
    if may_read_values(reads_nothing) and not reads_nothing.any():
        reads_nothing = None
    if implementation in ("eager", "sdpa"):
        return FullMask(added, reads_nothing)
    if added.shape[1] != 1:
        raise ValueError(
            f"A mask for each head needs attn_implementation='sdpa' or 'eager', but it is {implementation!r}: give "
            f"one of [batch, 1, queries, keys], not {list(added.shape)}."
        )
    return FullMask(added.expand(shape.batch, 1, shape.queries, shape.keys), reads_nothing)


def _is_causal_itself(implementation: str) -> bool:
    """Whether the attention function hides later keys if it gets no mask: it looks at the module's `is_causal`."""
    return implementation == "sdpa" or passes_masks_unexpanded(implementation)


def decoder_key_mask(
    attention_mask: Tensor | None, *, batch: int, query_positions: Tensor, past: int | Tensor, keys: int
) -> Tensor | None:
    """Which keys of a sparse decoder are real tokens; arguments as in `full_attention_mask`.

    A mask of `[batch, 1 or heads, queries, keys]` is accepted if it says no more than one of `[batch, keys]` together
    with causality, as those that `generate` makes for static caches do.

    Returns:
        `bool`, `[batch, keys]`, or None where all that can be read are known to be real.

    Raises:
        ValueError: if the mask does not fit.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        mask = _keys_of_causal_mask(attention_mask, batch, query_positions, keys)
    elif attention_mask.dim() == 2:
        _check_covers_keys(attention_mask, batch, past, query_positions.shape[0], is_causal=True)
        mask = _fit_keys(attention_mask != 0, keys)
    else:
        raise ValueError(
            f"attention_mask has the shape {list(attention_mask.shape)}, but a decoder with block-sparse attention "
            "takes [batch, length]. Masks of more dimensions need attention_type='original_full'."
        )
    if may_read_values(mask) and isinstance(past, int) and mask[:, : past + query_positions.shape[0]].all():
        return None
    return mask


def _keys_of_causal_mask(attention_mask, batch, query_positions, keys):
    """The last query of a piece reads whatever is real, up to itself."""
    heads = attention_mask.shape[1]  # as many as there are: one of them is looked at
    shape = ScoreShape(batch, heads, query_positions.shape[0], keys)
    expanded = expand_mask(attention_mask, shape, may_end_elsewhere=True)
    reads = expanded >= 0 if expanded.is_floating_point() else expanded
    mask = reads[:, 0, -1].expand(batch, -1)
    if may_read_values(mask):
        expected = mask[:, None, None] & causal_mask(query_positions, keys)
        is_real = mask[:, query_positions][:, None, :, None]
        if ((reads != expected) & is_real).any():
            raise ValueError(
                "attention_mask hides more than padding and later tokens. Masks of four dimensions that do so need "
                "attention_type='original_full'."
            )
    return mask


def passes_masks_unexpanded(implementation: str) -> bool:
    """Whether the attention function is one of the flash attention packages, which take `[batch, keys]`."""
    return implementation.startswith("flash_attention")


def _unexpanded(attention_mask, keys):
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has the shape {list(attention_mask.shape)}, but flash attention takes [batch, keys]. "
            "For other masks choose attn_implementation='sdpa'."
        )
    return _fit_keys(attention_mask != 0, keys)


def _check_covers_keys(attention_mask, batch, past, queries, is_causal):
    """A mask says of every token that there is so far whether it is real; a decoder's may go on for those to come."""
    masked_batch, length = attention_mask.shape
    if not isinstance(past, int) or (
        masked_batch == batch and (length == past + queries or (is_causal and length > past + queries))
    ):
        return
    raise ValueError(
        f"attention_mask must have the shape [batch, length] = [{batch}, {past + queries}]"
        + (f" ({past} tokens are in the cache)" if past else "")
        + f", but has {list(attention_mask.shape)}."
    )


def expand_mask(
    attention_mask: Tensor, shape: ScoreShape, name: str = "attention_mask", *, may_end_elsewhere: bool = False
) -> Tensor:
    """A user's 2-D, 3-D or 4-D mask as one that is broadcastable to `[batch, heads, queries, keys]`.

    Masks of `[batch, keys]` and `[batch, queries, keys]` hold 1 (or True) for what is read. One of
    `[batch, 1 or heads, queries, keys]` does so, too, if it holds booleans or integers; floating point numbers in it
    are added to the scores as they are. With `may_end_elsewhere`, a mask can be for more keys than there are, or for
    fewer: those beyond it (free places of a static cache) are not read.

    Raises:
        ValueError: if the mask has a shape that fits none of these.
    """
    batch, heads, queries, keys = shape
    wanted = {2: (batch, keys), 3: (batch, queries, keys), 4: (batch, heads, queries, keys)}.get(attention_mask.dim())
    if wanted is None or not (
        all(size in (1, fits) for size, fits in zip(attention_mask.shape[:-1], wanted[:-1], strict=True))
        and (may_end_elsewhere or attention_mask.shape[-1] == keys)
    ):
        raise ValueError(
            f"{name} must have the shape [batch, keys], [batch, queries, keys] or [batch, 1 or heads, queries, keys] "
            f"with batch {batch}, heads {heads}, queries {queries} and keys {keys}, but has "
            f"{list(attention_mask.shape)}."
        )
    expanded = attention_mask
    if attention_mask.dim() < 4:
        expanded = (attention_mask != 0)[(slice(None), *[None] * (4 - attention_mask.dim()))]
    elif not attention_mask.is_floating_point():
        expanded = attention_mask != 0
    return _fit_keys(expanded, keys)


def _fit_keys(mask: Tensor, keys: int) -> Tensor:
    """Cuts a mask to the number of keys, or fills it up with what is not read."""
    missing = keys - mask.shape[-1]
    if missing <= 0:
        return mask[..., :keys]
    nothing = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
    return torch.nn.functional.pad(mask, (0, missing), value=nothing)
