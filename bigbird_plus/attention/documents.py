"""Rows that hold several documents, one behind the other, without padding.

`DataCollatorWithFlattening` of transformers makes such rows, and says so by positions that start anew with each
document (`position_ids`), or besides by what flash attention takes: the places between documents (`cu_seq_lens_q`,
`cu_seq_lens_k`), the longest document (`max_length_q`, `max_length_k`) and the number of each token's document
(`seq_idx`). Any of them is enough, but for the longest document.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypedDict

import torch
from torch import Tensor

from .common import has_free_shapes, is_capturing, is_exporting


class Flattened(TypedDict, total=False):
    """The keyword arguments that describe such rows beside `position_ids`.

    cu_seq_lens_q, cu_seq_lens_k: `int32`, `[documents + 1]`: where documents begin in the flattened batch, and where
        it ends.
    max_length_q, max_length_k: tokens of the longest document. Not needed.
    seq_idx: `int32`, `[batch, length]`: the number of each token's document.
    """

    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    max_length_q: int
    max_length_k: int
    seq_idx: Tensor


def uncompiled_for_documents(forward: Callable) -> Callable:
    """A model's `forward` that `torch.compile` leaves as it is where rows hold several documents: how many there are,
    and how long, would make a graph of its own each time. For that positions are looked at between two graphs, unless
    all that is read is read in full by a model without a head: a mask says enough then."""
    place = list(inspect.signature(forward).parameters).index("position_ids")

    @wraps(forward)
    def forward_of_graphs(*args, **kwargs):
        if not torch.compiler.is_compiling() or is_exporting():
            return forward(*args, **kwargs)
        if any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")):
            return _as_it_is(forward, *args, **kwargs)
        position_ids = args[place] if len(args) > place else kwargs.get("position_ids")
        has_cache = any(kwargs.get(name) is not None for name in ("past_key_values", "cache"))
        needs_values = not has_cache and getattr(args[0], "attention_type", None) != "original_full"
        if needs_values and position_ids is not None and _start_anew(position_ids):
            return _as_it_is(forward, *args, **kwargs)
        return forward(*args, **kwargs)

    return forward_of_graphs


@torch.compiler.disable
def _as_it_is(forward, *args, **kwargs):
    return forward(*args, **kwargs)


@torch.compiler.disable
def _start_anew(position_ids: Tensor) -> bool:
    return holds_documents(position_ids.flatten(0, -2), None)


def document_positions(
    position_ids: Tensor | None, attention_mask: Tensor | None, shape: tuple[int, ...], flattened: Mapping[str, Any]
) -> Tensor | None:
    """The positions of the tokens, counted anew in each document if there are several; `position_ids` if nothing else
    tells of documents.

    Args:
        position_ids: `int64`, `[1 or batch, length]`, or None.
        attention_mask: the user's. Rows of documents have no padding.
        shape: batch and length.
        flattened: see `Flattened`.

    Raises:
        TypeError: for other keyword arguments than these: misspelt ones shall not vanish.
        ValueError: if the arguments contradict each other, or do not fit the input.
    """
    unknown = [name for name in flattened if name not in Flattened.__annotations__]
    if unknown:
        raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}.")
    starts = {
        name: _starts(name, tensor, shape)
        for name, tensor in flattened.items()
        if tensor is not None and "max" not in name
    }
    if not starts:
        return position_ids
    if attention_mask is not None and not (attention_mask != 0).all():
        raise ValueError(
            f"{next(iter(starts))} is for rows without padding, but attention_mask has zeros. Leave it out."
        )
    if position_ids is not None:
        starts["position_ids"] = document_starts(position_ids).expand(shape)
    (first, expected), *others = starts.items()
    for name, other in others:
        if not torch.equal(expected, other):
            raise ValueError(f"{first} and {name} contradict each other: documents begin elsewhere. Give one of them.")
    if position_ids is not None:
        return position_ids
    places = torch.arange(shape[1], device=expected.device).expand(shape)
    return places - places.masked_fill(~expected, 0).cummax(dim=1).values


def _starts(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`bool`, `[batch, length]`: where documents begin, but for the first places of the rows."""
    batch, length = shape
    if name == "seq_idx":
        if tensor.shape != shape:
            raise ValueError(
                f"seq_idx must have the shape [batch, length] = {list(shape)}, but has {list(tensor.shape)}."
            )
        return torch.diff(tensor, prepend=tensor[:, :1], dim=-1) != 0
    bounds = tensor.long()
    rows = torch.arange(batch + 1, device=bounds.device) * length
    fits = bounds.dim() == 1 and len(bounds) > 1 and bool((bounds.diff() >= 0).all())
    if not fits or not torch.isin(rows, bounds).all() or bounds[0] != 0 or bounds[-1] != batch * length:
        raise ValueError(
            f"{name} must rise from 0 to batch * length = {batch * length} by way of the beginning of each row, but "
            f"is {bounds.tolist()}."
        )
    starts = torch.zeros(batch * length + 1, dtype=torch.bool, device=bounds.device)
    starts[bounds], starts[rows] = True, False
    return starts[:-1].view(batch, length)


def document_starts(position_ids: Tensor) -> Tensor:
    """`bool`, `[batch, length]`: where in a row another document starts, but for the first: wherever positions do not
    go on by one."""
    return torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1


def holds_documents(position_ids: Tensor | None, attention_mask: Tensor | None) -> bool:
    """Whether rows hold several documents: positions start anew at 0 within a row, and nothing is padding. (Positions
    that go on otherwise are just positions.) Not while a graph is traced, in which values are not known. A CUDA graph
    gets a check of its own, and stops with an error when it is to read several documents."""
    if position_ids is None or has_free_shapes():
        return False
    if attention_mask is not None and attention_mask.dim() != 2:
        return False
    starts = document_starts(position_ids)
    holds = starts.any() & (~starts | (position_ids == 0)).all()
    if attention_mask is not None:
        holds = holds & attention_mask.all()
    if is_capturing():
        torch._assert_async(~holds, "position_ids of several documents in a row are not for CUDA graphs")
        return False
    return bool(holds)  # a GPU is waited for once


def first_tokens(position_ids: Tensor, batch: int) -> tuple[Tensor, ...]:
    """Rows and places of the first token of each document, in order."""
    starts = document_starts(position_ids).expand(batch, -1).clone()
    starts[:, 0] = True
    return starts.nonzero(as_tuple=True)


def is_first_place(attention_mask: Tensor) -> Tensor:
    """`bool`, `[1, length]`: whether a place is the first of a row of a mask, `[batch, length]`."""
    return torch.arange(attention_mask.shape[-1], device=attention_mask.device)[None] == 0


def first_places(states: Tensor, attention_mask: Tensor | None, config) -> Tensor:
    """`int64`, `[batch]`: where the documents of `states`, `[batch, length, ...]`, begin. That is the first place of
    the tensor, padding or not, unless documents are read as they are alone (`config.pattern_per_document`)."""
    if not config.pattern_per_document or attention_mask is None or attention_mask.dim() != 2:
        return torch.zeros(states.shape[0], dtype=torch.int64, device=states.device)
    return (attention_mask != 0).int().argmax(dim=-1)


def first_states(states: Tensor, attention_mask: Tensor | None, config, position_ids: Tensor | None = None) -> Tensor:
    """`[documents, hidden_size]`: the state of each document's first token. `position_ids` is given if rows hold
    several documents, in which each starts anew; otherwise there is one in each row."""
    if position_ids is not None:
        return states[first_tokens(position_ids, states.shape[0])]
    if not config.pattern_per_document:
        return states[:, 0]
    return states[torch.arange(states.shape[0], device=states.device), first_places(states, attention_mask, config)]


def same_document_mask(position_ids: Tensor) -> Tensor:
    """`bool`, `[batch, length, length]`: whether two tokens belong together, for graphs, which know no values."""
    document = document_starts(position_ids).cumsum(-1)
    return document[:, :, None] == document[:, None]
