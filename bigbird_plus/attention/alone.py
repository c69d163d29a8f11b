"""Attention modules that are called alone, or unlike the rest of their model: how they read."""

from dataclasses import replace

import torch
from torch import Tensor

from . import masks
from .parts import AnyPart, FullPart, SharedPart, SparsePart
from .plan import Plan, full_implementation


def refuse_block_masks(**block_masks) -> None:
    """Raises a `ValueError` if a mask of blocks is given, of those that transformers' layers get from their model."""
    for name, mask in block_masks.items():
        if mask is not None:
            raise ValueError(
                f"{name} must be left out: layers do not take masks of blocks, but a plan that the model makes. Call "
                "the model for block-sparse attention, or give attention_mask for full attention."
            )


def how_to_read(attention_mask: Plan | FullPart | Tensor | None, module, query: Tensor, keys: int) -> Plan | FullPart:
    """The plan for an attention module. What the model has planned it is, but for a module whose own `attention_type`
    is full. Called alone, without a plan, a module reads so many `keys` in full, but for what a mask hides: one of
    `[batch, 1 or heads, queries, keys]` that is added to the scores or says what is read (`bool`), or a `bool` one of
    `[batch, keys]` or `[batch, queries, keys]`.

    Raises:
        ValueError: if the mask does not fit.
    """
    if isinstance(attention_mask, Plan) and module.attention_type == "original_full":
        return read_in_full(attention_mask, module, query)
    if isinstance(attention_mask, Plan | FullPart):
        return attention_mask
    name = "eager" if module.config._attn_implementation == "eager" else "sdpa"
    if attention_mask is None and not module.is_causal:
        return FullPart(implementation=name)
    batch, heads, queries = query.shape[:3]
    shape = masks.ScoreShape(batch, heads, queries, keys)
    mask = attention_mask
    if mask is None:
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device).expand(-1, -1, -1, keys)
    if mask.is_floating_point() and mask.dim() != 4:
        raise ValueError(
            "A mask of floating point numbers, which are added to the scores, must have the shape "
            f"[batch, 1 or heads, queries, keys], but has {list(mask.shape)}. Others must be bool."
        )
    mask = masks.expand_mask(mask, shape).expand(-1, -1, queries, -1)  # so it is not causal
    full_mask = masks.cross_attention_mask(mask, shape, dtype=query.dtype, implementation=name)
    return FullPart(mask=full_mask, implementation=name)


def read_in_full(plan: Plan, module, query: Tensor) -> Plan:
    """`plan` for a module that reads everything in full.

    Raises:
        ValueError: in a sparse decoder.
    """
    if all(part.is_full for part in plan.parts):
        return plan
    if module.is_causal:
        raise ValueError(
            "All layers of a decoder must have one attention_type. Call set_attention_type of the model, not of a "
            "layer."
        )
    name = full_implementation(module.config)
    parts: list[AnyPart] = []
    for part in plan.parts:
        if isinstance(part, SparsePart):
            mask = masks.NO_MASK if part.key_mask is None else masks.key_mask_of(part.key_mask, query.dtype, name)
            part = FullPart(part.start, part.size, part.documents, mask=mask, implementation=name)
        elif isinstance(part, SharedPart):
            part = replace(part, sparsity=None)
        parts.append(part)
    return replace(plan, parts=tuple(parts), row=None)
