"""BigBird's attention as an operator, for models of one's own."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .common import cut, pad_to_blocks
from .engines import Call, Choice, choose_engine, engine_names, is_engine
from .masks import NO_MASK, as_global_mask, key_mask_of, padding_mask
from .parts import FullPart, Tokens, whole_batch
from .pattern import Sparsity


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int = 64,
    num_random_blocks: int = 3,
    num_sliding_window_blocks: int = 3,
    num_global_blocks: int = 2,
    global_block_indices: list[int] | None = None,
    different_layout_per_head: bool = True,
    attention_mask: Tensor | None = None,
    global_attention_mask: Tensor | None = None,
    layer_idx: int = 0,
    training: bool = False,
    eval_random_blocks: bool = False,
    max_position_embeddings: int = 4096,
    scaling: float | None = None,
    implementation: str | None = None,
    output_attentions: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """BigBird's block-sparse self-attention (arXiv 2007.14062) for models of one's own.

    The same function that the layers of `BigBirdModel` run. The length need not be a multiple of the block size. Up to
    `(num_global_blocks + num_sliding_window_blocks + 2 num_random_blocks) block_size` tokens, every token reads every
    other.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`, of one floating point dtype.
        block_size: tokens in a block.
        num_random_blocks: random blocks that each block reads.
        num_sliding_window_blocks: width of the window in blocks, an odd number.
        num_global_blocks: blocks that read everything and are read by all, half of them at either end.
        global_block_indices: which blocks those are, instead of a number; negative indices count from the end.
        different_layout_per_head: whether each head draws random blocks of its own.
        attention_mask: `[batch, length]`, 0 (or False) where a token is padding.
        global_attention_mask: `[batch, length]`, 1 (or True) for tokens that read everything and are read by all.
        layer_idx: seed of the random blocks.
        training: whether to read random blocks; in evaluation block 0 is read in their place.
        eval_random_blocks: read the random blocks in evaluation, too.
        max_position_embeddings: length, in tokens, for which random blocks are drawn (see `random_blocks`). A graph of
            `torch.export` that reads random blocks serves no longer inputs.
        scaling: what scores are multiplied by, `head_dim ** -0.5` by default.
        implementation: `"sdpa"` (the default; linear in the length, by the first engine that can: Triton kernels on
            NVIDIA's GPUs, merged flash attentions on a CPU, gathered blocks elsewhere), the name of one of these
            (`"triton"`, `"merged"`, `"gather"`) or of an engine of your own, `"flex_attention"` (linear as well; on
            a GPU, or on a CPU without gradients, else `"sdpa"` serves) or `"eager"` (the definition; quadratic).
        output_attentions: whether to return the probabilities, too. They take memory quadratic in the length.

    Returns:
        The context, `[batch, heads, length, head_dim]`, zero for padding where attention is sparse. With
        `output_attentions` a pair of it and the probabilities, `[batch, heads, length, length]`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check_arguments(query, key, value, implementation)
    batch, heads, length, head_dim = query.shape
    sparsity = Sparsity(
        num_attention_heads=heads,
        block_size=block_size,
        num_random_blocks=num_random_blocks,
        num_sliding_window_blocks=num_sliding_window_blocks,
        num_global_blocks=num_global_blocks,
        eval_random_blocks=eval_random_blocks,
        max_position_embeddings=max_position_embeddings,
        different_layout_per_head=different_layout_per_head,
        global_block_indices=global_block_indices,
    )
    layer = _Layer(layer_idx, list(range(heads)), head_dim**-0.5 if scaling is None else scaling, training)
    mask = padding_mask(attention_mask, batch, length)
    selected = as_global_mask(global_attention_mask, batch, length)
    implementation = implementation or "sdpa"
    if length <= sparsity.full_attention_length:
        name = "sdpa" if is_engine(implementation) else implementation
        full = FullPart(mask=NO_MASK if mask is None else key_mask_of(mask, query.dtype, name), implementation=name)
        context, probabilities = full.attend(layer, query, key, value, output_attentions)
        return context if probabilities is None else (context, probabilities)
    tokens = Tokens(batch, torch.arange(length, device=query.device), query.dtype)
    choose = partial(_choose, implementation, query, key, value, block_size)
    selected = selected if selected is None or mask is None else selected & mask
    part = whole_batch(sparsity, mask, tokens, choose, global_mask=selected)
    query, key, value = (pad_to_blocks(tensor, block_size, 2) for tensor in (query, key, value))
    context, probabilities = part.attend(layer, query, key, value, output_attentions)
    context = cut(context, length, 2)
    return context if probabilities is None else (context, cut(cut(probabilities, length, 2), length, 3))


def _choose(implementation, query, key, value, block_size, has_global_tokens) -> Choice:
    """The engine for some tensors."""
    call = Call(
        device=query.device,
        dtype=query.dtype,
        head_dim=query.shape[3],
        block_size=block_size,
        has_global_tokens=has_global_tokens,
        needs_gradients=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)),
    )
    return choose_engine(implementation, call)


def _check_arguments(query: Tensor, key: Tensor, value: Tensor, implementation: str | None) -> None:
    if query.dim() != 4 or query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            "query, key and value must have one shape, [batch, heads, length, head_dim], but have "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}."
        )
    names = [None, *engine_names()]
    if implementation not in names:
        raise ValueError(f"implementation must be one of {names}, but is {implementation!r}.")


class _Layer(NamedTuple):
    """What a part of a plan asks of an attention module."""

    layer_idx: int
    heads: list[int]
    scaling: float
    training: bool
    dropout_prob: float = 0.0
    is_causal: bool = False
