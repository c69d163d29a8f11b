"""Attention of BigBird: the one place that the model calls, and the operator for those who want it elsewhere.

*Which* tokens read which is the matter of `pattern`; *how* it is computed that of the engines: `eager`, the
definition, and three that are linear in the length: `triton`, the default on NVIDIA's GPUs, `sdpa`, that elsewhere,
and `flex`, on torch's FlexAttention.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..memory import runs
from . import eager, flex, sdpa
from .global_tokens import GlobalTokens, find_global_tokens
from .masks import additive_mask, global_mask, is_exporting, is_tracing, key_mask_bias, padding_mask
from .packing import PackedInput
from .pattern import BlockPattern, CausalPattern, Sparsity, count_blocks

triton_engine = None
if torch.version.cuda is not None:  # torch for other devices need not have Triton
    with suppress(ImportError):
        from . import triton as triton_engine


class SparseInput(NamedTuple):
    """What all layers have to know of an input that is read sparsely.

    sparsity: the settings of the pattern.
    num_blocks: blocks of the input, padded to a multiple of the block size.
    key_mask: `bool`, `[batch, padded length and extra tokens]`, False for padding; None where there is none.
    global_tokens: single tokens that read everything and are read by all; None for none.
    """

    sparsity: Sparsity
    num_blocks: int
    key_mask: Tensor | None
    global_tokens: GlobalTokens | None

    def pattern(self, layer_idx: int, training: bool) -> BlockPattern:
        """Which blocks read which."""
        return self.sparsity.pattern(self.num_blocks, layer_idx=layer_idx, training=training)

    @property
    def has_global_tokens(self) -> bool:
        """Whether there are single global tokens."""
        return self.global_tokens is not None

    def parts(self, states: Tensor, size: int) -> Iterator[tuple[Tensor, "SparseInput"]]:
        """Views of `states`, `[batch, padded length, ...]`, that hold documents of up to `size` tokens together or a
        longer one, and what layers have to know of each. For documents without global tokens."""
        batch, length = states.shape[:2]
        for documents in runs(0, batch, max(1, size // length)):
            taken = slice(documents.start, documents.stop)
            yield states[taken], self._replace(key_mask=None if self.key_mask is None else self.key_mask[taken])

    def only_document(self, layer_idx: int) -> tuple[BlockPattern, Tensor | None]:
        """Pattern in inference and key mask of a document that there is alone."""
        return self.pattern(layer_idx, training=False), self.key_mask


def pad_to_blocks(tensor: Tensor, block_size: int, dim: int) -> Tensor:
    """Fills up a dimension with zeros to a multiple of `block_size`."""
    length = tensor.shape[dim]
    missing = count_blocks(length, block_size) * block_size - length
    if not is_tracing() and not missing:  # one graph shall serve all lengths
        return tensor
    return nn.functional.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim % tensor.dim()) + [0, missing])


def cut(tensor: Tensor, length: int, dim: int) -> Tensor:
    """`tensor` without what lies beyond `length` in a dimension; itself, not a view of it, if there is nothing."""
    if is_tracing():  # a copy in any case, so that one graph serves lengths with and without padding
        return tensor.index_select(dim, torch.arange(length, device=tensor.device))
    return tensor if tensor.shape[dim] == length else tensor.narrow(dim, 0, length)


def make_sparse_input(
    sparsity: Sparsity,
    mask: Tensor | None,
    batch: int,
    length: int,
    device,
    *,
    chosen: Tensor | None = None,
    num_extra: int = 0,
) -> SparseInput:
    """Of `[batch, length]` tokens of which `mask` (`bool`, or None for all) are real and `chosen` (`bool`, or None for
    none) global, with so many extra global tokens behind their last block."""
    block_size = sparsity.block_size
    num_blocks = count_blocks(length, block_size)
    if mask is None and (is_tracing() or length % block_size):
        mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    if is_exporting():  # ONNX keeps no guards: shorter inputs, which have no such place, shall fail there all the same
        mask = mask & (torch.arange(length, device=device)[sparsity.full_attention_length] > 0)
    if chosen is not None and mask is not None:
        chosen = chosen & mask
    global_tokens = find_global_tokens(chosen, num_extra, batch, num_blocks * block_size, device)
    if mask is not None:
        mask = nn.functional.pad(pad_to_blocks(mask, block_size, 1), (0, num_extra), value=True)
    return SparseInput(sparsity, num_blocks, mask, global_tokens)


def sparse_engine(
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    has_global_tokens: bool = False,
) -> str:
    """The engine that computes block-sparse attention under a name: `"eager"` and `"flex_attention"` under their own,
    but where FlexAttention has no kernel, as for single global tokens, or a graph is traced; `"triton"` otherwise,
    where that has one, else `"sdpa"`."""
    if implementation == "eager":
        return "eager"
    wants_flex = implementation == "flex_attention" and not has_global_tokens and not is_tracing()
    if wants_flex and flex.has_kernel(query, key, value):
        return "flex_attention"
    return "triton" if not has_global_tokens and has_triton_kernel(query, block_size) else "sdpa"


def has_triton_kernel(query: Tensor, block_size: int) -> bool:
    """Whether the kernels in `triton` take these queries, `[batch, heads, length, head_dim]`. Graphs that leave the
    process are made of torch's own operators."""
    if triton_engine is None or is_exporting() or torch.jit.is_tracing():
        return False
    return triton_engine.has_kernel(query, block_size)


def full_engine(implementation: str, query: Tensor, dropout: float = 0.0) -> str:
    """The function, by the name that transformers has for it, that computes full attention under a name."""
    if implementation == "flex_attention" and (query.device.type == "cpu" or dropout):
        return "sdpa"  # the other fails there: with masks, gradients or dropout
    return implementation


def attend_sparsely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    key_mask: Tensor | None,
    global_tokens: GlobalTokens | None = None,
    *,
    scaling: float,
    implementation: str,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Block-sparse attention by an engine of ours, that which `sparse_engine` names.

    Asking a linear engine for probabilities computes them besides: the context stays the same to the bit.

    Returns:
        The context, `[batch, heads, length, head_dim]`, and the probabilities, `[batch, heads, length, length]`, or
        None unless `output_attentions`.
    """
    arguments = (query, key, value, pattern, key_mask, global_tokens)
    block_size, has_global_tokens = query.shape[2] // pattern.num_blocks, global_tokens is not None
    engine = sparse_engine(
        implementation, query, key, value, block_size=block_size, has_global_tokens=has_global_tokens
    )
    if engine == "eager":
        context, probabilities = eager.block_sparse_attention(*arguments, scaling=scaling)
        return context, probabilities if output_attentions else None
    if engine == "flex_attention":
        context = flex.block_sparse_attention(query, key, value, pattern, key_mask, scaling=scaling)
    else:
        context = attend_linearly(*arguments, engine=engine, block_size=block_size, scaling=scaling)
    if not output_attentions:
        return context, None
    return context, eager.block_sparse_attention(*arguments, scaling=scaling)[1]


def attend_linearly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern | CausalPattern,
    key_mask: Tensor | None,
    global_tokens: GlobalTokens | None = None,
    *,
    engine: str,
    block_size: int,
    scaling: float,
) -> Tensor:
    """The context of `sdpa.block_sparse_attention`, by that engine or by `"triton"`."""
    if engine == "triton":
        how = {"block_size": block_size, "scaling": scaling}
        return triton_engine.block_sparse_attention(query, key, value, pattern, key_mask, **how)
    return sdpa.block_sparse_attention(query, key, value, pattern, key_mask, global_tokens, scaling=scaling)


def attend_fully(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    implementation: str,
    dropout: float = 0.0,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Full attention, through the function of transformers that `full_engine` names.

    Args:
        module: the attention module; its `is_causal` tells whether a query without a mask reads earlier keys only.
        query, key, value: `[batch, heads, length, head_dim]`; queries and keys can differ in length.
        mask: what is added to the scores, broadcastable to `[batch, heads, queries, keys]`. `[batch, keys]` for the
            flash attention of other packages, which take it so.

    Returns:
        As `attend_sparsely`.
    """
    if implementation == "eager":
        context, probabilities = eager.dense_attention(query, key, value, mask, scaling=scaling, dropout=dropout)
        return context, probabilities if output_attentions else None
    implementation = full_engine(implementation, query, dropout)
    if implementation == "flex_attention" and mask is not None:
        mask = mask.expand(query.shape[0], -1, query.shape[2], -1)
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    context, _ = function(module, query, key, value, mask, dropout=dropout, scaling=scaling)
    probabilities = None
    if output_attentions:
        probabilities = _full_probabilities(module, query, key, value, mask, scaling)
    return context.transpose(1, 2), probabilities


def attend_in_documents(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedInput,
    *,
    layer_idx: int,
    heads: list[int],
    dropout: float = 0.0,
    output_attentions: bool = False,
    **how,
) -> tuple[Tensor, Tensor | None]:
    """Attention of each document of a packed batch to itself.

    Args:
        module, query, key, value, how: as those of `attend_fully`; the batch is one row of `[1, heads, packed length
            and extra tokens, head_dim]`.
        packed: where the documents stand, and how they are read.
        layer_idx: the layer, for its random blocks.
        heads: which of the heads there are, if some were pruned.

    Returns:
        The context, in the shape of `query`, and the probabilities as of the padded batch, `[batch,
        heads, length, length]`, or None unless `output_attentions`.
    """
    block_size, has_global_tokens = packed.sparsity.block_size, packed.has_global_tokens
    engine = sparse_engine(
        how["implementation"], query, key, value, block_size=block_size, has_global_tokens=has_global_tokens
    )
    if engine == "triton" and packed.has_one_pattern and not output_attentions:
        pattern = packed.sparsity.pattern(packed.spans[0].num_blocks, layer_idx=layer_idx, training=module.training)
        tensors = (query, key, value, pattern.for_heads(heads), packed.mask_of_padding)
        sizes = {"block_size": block_size, "scaling": how["scaling"]}
        return triton_engine.block_sparse_attention(*tensors, documents=packed.extents, **sizes), None
    contexts, all_probabilities = [], None
    if output_attentions:
        all_probabilities = query.new_zeros(packed.batch, query.shape[1], packed.length, packed.length)
    documents = zip(*(packed.split(tensor) for tensor in (query, key, value)), strict=True)
    for span, global_tokens, tensors in zip(packed.spans, packed.global_tokens, documents, strict=True):
        key_mask = None
        if span.has_padding:
            key_mask = packed.key_mask[:, span.start : span.start + span.size]
            key_mask = nn.functional.pad(key_mask, (0, packed.num_extra), value=True)
        if span.num_blocks is None:
            bias = None if key_mask is None else key_mask_bias(key_mask, query.dtype, how["implementation"])
            result = attend_fully(module, *tensors, bias, dropout=dropout, output_attentions=output_attentions, **how)
        else:
            pattern = span.pattern(packed.sparsity, layer_idx, module.training).for_heads(heads)
            result = attend_sparsely(
                *tensors, pattern, key_mask, global_tokens, output_attentions=output_attentions, **how
            )
        contexts.append(result[0])
        if output_attentions:
            own = slice(span.first, span.first + span.length)
            all_probabilities[span.row, :, own, own] = result[1][0, :, : span.length, : span.length]
    return packed.join(contexts), all_probabilities


def _full_probabilities(module, query, key, value, mask, scaling):
    """The probabilities behind a context that a faster function has computed."""
    if mask is not None and mask.dim() == 2:
        mask = additive_mask(mask[:, None, None] != 0, torch.float32)
    if module.is_causal and (mask is None or mask.shape[-2] == 1) and query.shape[2] > 1:
        queries, keys = query.shape[2], key.shape[2]
        earlier = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        causal = additive_mask(earlier, torch.float32)
        mask = causal if mask is None else torch.minimum(mask, causal)
    return eager.dense_attention(query, key, value, mask, scaling=scaling)[1]


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
        implementation: `"sdpa"` (the default; linear in the length, on NVIDIA's GPUs by Triton kernels),
            `"flex_attention"` (linear as well; on a GPU, or on a CPU without gradients, else `"sdpa"` serves) or
            `"eager"` (the definition; quadratic).
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
    mask = padding_mask(attention_mask, batch, length)
    chosen = global_mask(global_attention_mask, batch, length)
    how = {
        "scaling": head_dim**-0.5 if scaling is None else scaling,
        "implementation": implementation or "sdpa",
        "output_attentions": output_attentions,
    }
    if length <= sparsity.full_attention_length:
        bias = None if mask is None else additive_mask(mask[:, None, None], query.dtype)
        context, probabilities = attend_fully(_NotCausal(), query, key, value, bias, **how)
    else:
        blocks = make_sparse_input(sparsity, mask, batch, length, query.device, chosen=chosen)
        padded = (pad_to_blocks(tensor, block_size, 2) for tensor in (query, key, value))
        pattern = sparsity.pattern(blocks.num_blocks, layer_idx=layer_idx, training=training)
        context, probabilities = attend_sparsely(*padded, pattern, blocks.key_mask, blocks.global_tokens, **how)
        context = cut(context, length, 2)
        probabilities = None if probabilities is None else cut(cut(probabilities, length, 2), length, 3)
    return (context, probabilities) if output_attentions else context


def _check_arguments(query: Tensor, key: Tensor, value: Tensor, implementation: str | None) -> None:
    if query.dim() != 4 or query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            "query, key and value must have one shape, [batch, heads, length, head_dim], but have "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}."
        )
    if implementation not in (None, "sdpa", "flex_attention", "eager"):
        raise ValueError(
            f"implementation must be 'sdpa', 'flex_attention', 'eager' or None, but is {implementation!r}."
        )


class _NotCausal(nn.Module):
    """What transformers' attention functions ask of a module."""

    is_causal = False
    training = False
