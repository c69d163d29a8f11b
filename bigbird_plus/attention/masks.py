"""Masks of full attention, from what users pass to what attention functions add to their scores."""

import torch
from torch import Tensor

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
"""Whether a graph is being made that is to leave the process, by `torch.export` or `torch.onnx.export`. (torch 2.6
does not tell.)"""


def is_tracing() -> bool:
    """Whether a graph is being made of what happens: by `torch.compile`, `torch.export`, `torch.jit.trace` or CUDA."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # torch.compile fails at that


def may_read_values(tensor: Tensor) -> bool:
    """Whether Python may look at a tensor's values: not while a graph is traced, and not where it would wait for a
    device."""
    return tensor.device.type == "cpu" and not is_tracing()


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


def global_mask(global_attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
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


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where `mask` is True, the least finite number elsewhere, so that a row with nothing
    to read stays finite."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def compute_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype of queries and keys made of these states: another one under autocast."""
    device = hidden_states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype


def full_attention_mask(
    attention_mask: Tensor | None,
    *,
    batch: int,
    heads: int,
    query_positions: Tensor,
    past: int | Tensor,
    keys: int,
    is_causal: bool,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor | None:
    """What full self-attention adds to its scores, or None where the attention function needs no telling.

    Args:
        attention_mask: the user's, see `expand_mask`.
        batch: sequences.
        heads: attention heads.
        query_positions: `int64`, `[queries]`: places of the queries among the keys.
        past: number of tokens that a cache already holds.
        keys: number of keys, free places of a static cache included.
        is_causal: whether later keys are hidden. A 4-D mask is taken to say so itself.
        dtype: the queries'.
        implementation: name of the attention function.

    Raises:
        ValueError: if the mask does not fit.
    """
    queries = query_positions.shape[0]
    if attention_mask is not None and attention_mask.dim() == 2:
        _check_covers_keys(attention_mask, batch, past, queries, is_causal)
        attention_mask = attention_mask != 0
        if may_read_values(attention_mask) and attention_mask.all():
            attention_mask = None
    if _passes_masks_unexpanded(implementation):
        return _unexpanded(attention_mask, keys)
    if attention_mask is None:
        from_start = isinstance(past, int) and past == 0 and keys == queries and _is_causal_itself(implementation)
        last_only = isinstance(past, int) and queries == 1 and keys == past + 1
        if not is_causal or from_start or last_only:
            return None
        expanded = causal_mask(query_positions, keys)[None, None]
    else:
        expanded = expand_mask(attention_mask, batch, heads, queries, keys, may_end_elsewhere=is_causal)
        if is_causal and attention_mask.dim() < 4:
            expanded = expanded & causal_mask(query_positions, keys)
    return _to_be_added(expanded, dtype, implementation, (batch, 1, queries, keys))


def cross_attention_mask(
    attention_mask: Tensor | None,
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor | None:
    """What attention to an encoder's states adds to its scores, or None; arguments as in `full_attention_mask`."""
    name = "encoder_attention_mask"
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2 and attention_mask.shape[-1] != keys:
        raise ValueError(f"{name} is for {attention_mask.shape[-1]} tokens, but encoder_hidden_states has {keys}.")
    if may_read_values(attention_mask) and attention_mask.dim() == 2 and (attention_mask != 0).all():
        return None
    if _passes_masks_unexpanded(implementation):
        return _unexpanded(attention_mask, keys)
    expanded = expand_mask(attention_mask, batch, heads, queries, keys, name)
    return _to_be_added(expanded, dtype, implementation, (batch, 1, queries, keys))


def _to_be_added(expanded, dtype, implementation, shape):
    """Numbers stay as they are, but finite. Only eager and sdpa attention take what is broadcastable to `shape`."""
    if expanded.is_floating_point():
        added = expanded.clamp(min=torch.finfo(dtype).min).to(dtype)
    else:
        added = additive_mask(expanded, dtype)
    if implementation in ("eager", "sdpa"):
        return added
    if added.shape[1] != 1:
        raise ValueError(
            f"A mask for each head needs attn_implementation='sdpa' or 'eager', but it is {implementation!r}: give "
            f"one of [batch, 1, queries, keys], not {list(added.shape)}."
        )
    return added.expand(shape)


def _is_causal_itself(implementation: str) -> bool:
    """Whether the attention function hides later keys if it gets no mask: it looks at the module's `is_causal`."""
    return implementation == "sdpa" or _passes_masks_unexpanded(implementation)


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
    expanded = expand_mask(attention_mask, batch, heads, query_positions.shape[0], keys, may_end_elsewhere=True)
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


def key_mask_bias(key_mask: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    """What full attention adds to its scores for the sake of padding alone; `key_mask` is `bool`, `[batch, keys]`."""
    return key_mask if _passes_masks_unexpanded(implementation) else additive_mask(key_mask[:, None, None], dtype)


def _passes_masks_unexpanded(implementation: str) -> bool:
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


def causal_mask(query_positions: Tensor, key_length: int) -> Tensor:
    """`bool`, `[queries, keys]`: whether a query at a position of the sequence may read a key."""
    keys = torch.arange(key_length, device=query_positions.device)
    return keys <= query_positions[:, None]


def document_starts(position_ids: Tensor) -> Tensor:
    """`bool`, `[batch, length]`: where in a row another document starts, when several are packed into it: wherever the
    positions do not go on by one."""
    return torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1


def same_document_mask(position_ids: Tensor) -> Tensor | None:
    """`bool`, `[batch, length, length]`: whether two tokens belong together where several documents are packed into
    one row. None if none are known to be."""
    starts = document_starts(position_ids)
    if may_read_values(starts) and not starts.any():
        return None
    document = starts.cumsum(-1)
    return document[:, :, None] == document[:, None]


def expand_mask(
    attention_mask: Tensor,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    name: str = "attention_mask",
    *,
    may_end_elsewhere: bool = False,
) -> Tensor:
    """A user's 2-D, 3-D or 4-D mask as one that is broadcastable to `[batch, heads, queries, keys]`.

    Masks of `[batch, keys]` and `[batch, queries, keys]` hold 1 (or True) for what is read. One of
    `[batch, 1 or heads, queries, keys]` does so, too, if it holds booleans or integers; floating point numbers in it
    are added to the scores as they are. With `may_end_elsewhere`, a mask can be for more keys than there are, or for
    fewer: those beyond it (free places of a static cache) are not read.

    Raises:
        ValueError: if the mask has a shape that fits none of these.
    """
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
