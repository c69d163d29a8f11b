"""Block-sparse attention on NVIDIA's GPUs: Triton kernels that walk over the lists of blocks which each block reads.

A row of the pattern, or a part of it, is a program: it holds the queries, takes the keys of the blocks in its list one
after another, and keeps a running softmax (as flash attention does, arXiv 2307.08691). A block that is read c times
gets `+ log(c)` on its scores. The gradients of the queries walk over the same lists, those of keys and values over the
lists of the blocks that read each block, so that no two programs write other numbers to one place: results do not
vary.

Long lists, those of global blocks, are cut in segments for several programs, whose results are merged.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from .block_lists import BlockLists, make_lists
from .pattern import BlockPattern, CausalPattern
from .triton_kernels import LOG2_E, forward_kernel, key_gradient_kernel, merge_kernel, query_gradient_kernel

TILES = (64, 32, 16)
"""Tokens that a program takes at a time: the most of these that divide a block."""

MOST_HEAD_DIM = 128
"""Width of a head, at most."""

PROGRAMS = 512
"""How many a large GPU runs at once, more or less."""

SHORTEST_SEGMENT = 64
"""Blocks in a segment of a long list, at least."""


def has_kernel(query: Tensor, block_size: int) -> bool:
    """Whether the kernels take these tensors: on an NVIDIA GPU from compute capability 8.0 on, in 16 or 32 bits, with
    blocks of a multiple of 16 tokens."""
    if query.device.type != "cuda" or torch.version.hip is not None or query.dtype is torch.float64:
        return False
    fits = block_size % TILES[-1] == 0 and query.shape[-1] <= MOST_HEAD_DIM
    return fits and _is_recent(query.device)


@torch.compiler.assume_constant_result
def _is_recent(device: torch.device) -> bool:
    return _capability(device) >= (8, 0)


_capability = cache(torch.cuda.get_device_capability)  # asked for in every layer


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern | CausalPattern,
    key_mask: Tensor | None,
    *,
    block_size: int,
    scaling: float,
    documents: Tensor | None = None,
) -> Tensor:
    """The context of `eager.block_sparse_attention`, `[batch, heads, length, head_dim]`, from the same arguments and
    the block size, for tensors that `has_kernel` accepts. With a `CausalPattern` that of `eager.causal_attention`, for
    documents that begin at the first place.

    Args:
        documents: `int32`, `[documents, 3]`, if the batch is one row of documents of which each is a part of an input
            with this pattern: the place in the row where the input's first block would stand, the first block of the
            input that is there, and the end of them. Documents take whole blocks, and fill the row.
    """
    tensors = [tensor.transpose(1, 2).contiguous() for tensor in (query, key, value)]
    if torch.compiler.is_compiling():
        fields, middle_blocks, random_blocks = _as_arguments(pattern)
        operator = torch.ops.bigbird_plus.triton_attention
        context, _ = operator(*tensors, key_mask, random_blocks, fields, middle_blocks, block_size, scaling)
    else:
        context = _BlockSparseAttention.apply(*tensors, key_mask, documents, pattern, block_size, scaling)
    return context.transpose(1, 2)


class _BlockSparseAttention(torch.autograd.Function):
    """On contiguous tensors of `[batch, length, heads, dim]`."""

    @staticmethod
    def forward(ctx, query, key, value, key_mask, documents, *how):
        output, log_sum_exp = _attend(query, key, value, key_mask, documents, *how)
        ctx.save_for_backward(query, key, value, key_mask, documents, output, log_sum_exp)
        ctx.how = how
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        *inputs, output, log_sum_exp = ctx.saved_tensors
        return *_gradients(grad_output, *inputs, *ctx.how, output, log_sum_exp), None, None, None, None, None


def _attend(query, key, value, key_mask, documents, pattern, block_size, scaling) -> tuple[Tensor, Tensor]:
    """Contexts and log-sum-exps, `float32`, `[batch, length, heads]`."""
    call = _make_call(query, documents, pattern, block_size, scaling)
    output, log_sum_exp = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
    parts, lse_parts = _empty_parts(call, output), _empty_parts(call, log_sum_exp)
    results = (output, log_sum_exp, parts, lse_parts)
    _launch(forward_kernel, call, call.reads, query, key, value, key_mask, documents, *results)
    _merge(call, parts[None], output[None], lse_parts, log_sum_exp)
    return output, log_sum_exp


def _gradients(
    grad_output, query, key, value, key_mask, documents, pattern, block_size, scaling, output, log_sum_exp
) -> Tensor:
    """Those of queries, keys and values, `[3, batch, length, heads, dim]`."""
    call = _make_call(query, documents, pattern, block_size, scaling)
    inputs = (query, key, value, key_mask, documents)
    grads, parts = output.new_empty(3, *output.shape), _empty_parts(call, output, 3)
    known = (log_sum_exp, grad_output.contiguous(), torch.empty_like(log_sum_exp))
    _launch(query_gradient_kernel, call, call.reads, *inputs, output, *known, grads[0], parts[0])
    _launch(key_gradient_kernel, call, call.read_by, *inputs, *known, *grads[1:], *parts[1:])
    _merge(call, parts, grads)
    return grads


def _count_segments(pattern: BlockPattern | CausalPattern, copies: int) -> int:
    """In how many segments to cut long lists, so that none takes longer than all the rest, for so many sequences and
    heads."""
    work = 8 * copies * pattern.num_blocks  # a block reads about 8
    return -(-pattern.num_blocks // max(SHORTEST_SEGMENT, work // PROGRAMS))


class _Call(NamedTuple):
    """What the kernels of a call have in common.

    reads, read_by: the lists of blocks.
    documents, num_documents: those that are packed, or None, and how many there are in either case.
    scale: of the scores, to base 2.
    is_causal: whether a token reads no later one.
    sizes: what the kernels are compiled for.
    """

    reads: BlockLists
    read_by: BlockLists
    documents: Tensor | None
    num_documents: int
    scale: float
    is_causal: bool
    sizes: dict[str, int]


def _make_call(query: Tensor, documents: Tensor | None, pattern, block_size: int, scaling: float) -> _Call:
    heads, head_dim = query.shape[2:]
    num_documents = query.shape[0] if documents is None else len(documents)
    lists = make_lists(pattern, _count_segments(pattern, num_documents * heads), query.device)
    scale, is_causal = scaling * LOG2_E.value, isinstance(pattern, CausalPattern)
    sizes = _sizes(heads, head_dim, block_size, query.element_size())
    return _Call(*lists, documents, num_documents, scale, is_causal, sizes)


@cache
def _sizes(heads: int, head_dim: int, block_size: int, element_size: int) -> dict[str, int]:
    most = 64 if element_size == 2 else 32  # what fits in the registers
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "WIDTH": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK": block_size,
        "TILE": next(size for size in TILES if size <= most and block_size % size == 0),
    }


def _empty_parts(call: _Call, tensor: Tensor, *copies: int) -> Tensor:
    """For what is to be merged to `tensor`, `[batch, tokens, ...]`: `float32`, `[documents, tokens of parts, ...]`,
    in so many copies."""
    tokens = call.reads.num_shared * call.sizes["BLOCK"]
    return tensor.new_empty(*copies, call.num_documents, tokens, *tensor.shape[2:], dtype=torch.float32)


def _launch(kernel, call: _Call, lists: BlockLists, *tensors: Tensor | None) -> None:
    """Runs a kernel for all lists."""
    sizes = call.sizes
    grid = (call.num_documents * sizes["HEADS"], len(lists.rows) * (sizes["BLOCK"] // sizes["TILE"]))
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](
            *tensors,
            *(lists.rows, lists.starts, lists.blocks, lists.gains),
            *(lists.num_blocks, lists.num_long, lists.segments),
            call.scale,
            **sizes,
            LAYOUTS=lists.starts.shape[0],
            IS_CAUSAL=call.is_causal,
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
            num_stages=2,
        )


def _merge(call: _Call, parts: Tensor, targets: Tensor, lse_parts=None, log_sum_exp=None) -> None:
    """Writes to `targets`, `[n, batch, length, heads, dim]`, and to `log_sum_exp` what the parts of long lists make
    together."""
    lists, sizes = call.reads, call.sizes
    if not lists.num_shared:
        return
    grid = (call.num_documents * sizes["HEADS"], lists.num_long * (sizes["BLOCK"] // sizes["TILE"]), len(targets))
    with torch.cuda.device_of(targets):
        merge_kernel[grid](
            *(parts, lse_parts, targets, log_sum_exp, call.documents, lists.rows),
            *(lists.num_blocks, lists.num_long, lists.segments),
            *(parts[0].numel(), targets[0].numel()),
            **sizes,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The same for graphs of torch.compile, in which patterns are numbers and tensors
# ---------------------------------------------------------------------------------------------------------------------


# torch 2.6 cannot make them of `list[int]`.
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? random_blocks, SymInt[] fields, "
    "SymInt[]? middle_blocks, SymInt block_size, float scaling"
)
_SCHEMA = f"({_INPUTS}) -> (Tensor, Tensor)"
_SCHEMA_OF_GRADIENTS = f"(Tensor grad_output, {_INPUTS}, Tensor output, Tensor log_sum_exp) -> Tensor"


@torch.library.custom_op("bigbird_plus::triton_attention", mutates_args=(), schema=_SCHEMA)
def _traced_attention(
    query, key, value, key_mask, random_blocks, fields, middle_blocks, block_size, scaling
) -> tuple[Tensor, Tensor]:
    pattern = _from_arguments(fields, middle_blocks, random_blocks)
    return _attend(query, key, value, key_mask, None, pattern, block_size, scaling)


@_traced_attention.register_fake
def _(query, *others):
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("bigbird_plus::triton_attention_backward", mutates_args=(), schema=_SCHEMA_OF_GRADIENTS)
def _traced_gradients(
    grad_output,
    query,
    key,
    value,
    key_mask,
    random_blocks,
    fields,
    middle_blocks,
    block_size,
    scaling,
    output,
    log_sum_exp,
) -> Tensor:
    pattern = _from_arguments(fields, middle_blocks, random_blocks)
    return _gradients(
        grad_output, query, key, value, key_mask, None, pattern, block_size, scaling, output, log_sum_exp
    )


@_traced_gradients.register_fake
def _(grad_output, query, *others):
    return query.new_empty(3, *query.shape)


def _save_for_gradients(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.how = inputs[5:]


def _traced_backward(ctx, grad_output, _):
    *inputs, output, log_sum_exp = ctx.saved_tensors
    grads = torch.ops.bigbird_plus.triton_attention_backward(grad_output, *inputs, *ctx.how, output, log_sum_exp)
    return *grads.unbind(), *[None] * 6


_traced_attention.register_autograd(_traced_backward, setup_context=_save_for_gradients)


def _as_arguments(pattern: BlockPattern | CausalPattern) -> tuple[list[int], list[int] | None, Tensor | None]:
    """A pattern as operators take it: its numbers; the middle blocks, None for a causal one; the random blocks."""
    if isinstance(pattern, CausalPattern):
        return [pattern.num_blocks, pattern.num_full, pattern.num_leading, pattern.window], None, pattern.random_blocks
    fields = [pattern.num_blocks, pattern.num_leading, pattern.num_trailing, pattern.half_window]
    return [*fields, pattern.first_block_extra], list(pattern.middle_blocks), pattern.random_blocks


def _from_arguments(fields: list[int], middle_blocks: list[int] | None, random_blocks: Tensor | None):
    """The reverse, the same object for the same arguments."""
    random = None if random_blocks is None else (random_blocks.numpy().tobytes(), random_blocks.shape)
    return _cached_pattern(tuple(fields), None if middle_blocks is None else tuple(middle_blocks), random)


@lru_cache(maxsize=256)
def _cached_pattern(fields: tuple, middle_blocks: tuple | None, random: tuple | None) -> BlockPattern | CausalPattern:
    random_blocks = None if random is None else np.frombuffer(random[0], dtype=np.int64).reshape(random[1])
    if middle_blocks is None:
        return CausalPattern(*fields, random_blocks)
    *fields, first_block_extra = fields
    return BlockPattern(*fields, middle_blocks, first_block_extra, random_blocks)
