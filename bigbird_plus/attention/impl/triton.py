"""Block-sparse attention on NVIDIA's GPUs: Triton kernels that walk over the lists of blocks which each block reads.

A row of the pattern, or a part of it, is a program: it holds the queries, takes the keys of the blocks in its list one
after another, and keeps a running softmax (as flash attention does, arXiv 2307.08691). A block that is read c times
gets `+ log(c)` on its scores. The gradients of the queries walk over the same lists, those of keys and values over the
lists of the blocks that read each block, so that no two programs write other numbers to one place: results do not
vary.

Long lists, those of global blocks, are cut in segments for several programs, whose results are merged.

Single global tokens fill blocks of their own, see `triton_copies`.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import ops
from ..common import is_exporting, is_transformed
from ..global_tokens import GlobalTokens
from ..ops import Reading
from ..pattern import BlockPattern
from .triton_copies import Copies
from .triton_kernels import (
    HUGE,
    LOG2_E,
    forward_kernel,
    key_gradient_kernel,
    merge_kernel,
    query_gradient_kernel,
)
from .triton_lists import WalkLists, make_lists

NAME = "triton"

TILES = (64, 32, 16)
"""Tokens that a program takes at a time: the most of these that divide a block."""

MOST_HEAD_DIM = 128
"""Width of a head, at most."""

PROGRAMS = 512
"""How many a large GPU runs at once, more or less."""

SHORTEST_SEGMENT = 64
"""Blocks in a segment of a long list, at least."""


def reason(call) -> str | None:
    """Why it cannot run a call; None if it can."""
    if call.device.type != "cuda" or torch.version.hip is not None:
        return "the kernels are for NVIDIA's GPUs"
    if is_exporting() or torch.jit.is_tracing():
        return "graphs that leave the process are made of torch's own operators"
    if is_transformed():
        return "transforms of torch.func take torch's own operators only"
    if call.dtype is torch.float64:
        return "the kernels compute in 16 or 32 bits, not in float64"
    if call.block_size % TILES[-1]:
        return f"the kernels take block sizes that are multiples of {TILES[-1]}, not {call.block_size}"
    if call.head_dim > MOST_HEAD_DIM:
        return f"the kernels take heads of up to {MOST_HEAD_DIM} numbers, not {call.head_dim}"
    return None if _is_recent(call.device) else "the kernels need compute capability 8.0 or later"


@torch.compiler.assume_constant_result
def _is_recent(device: torch.device) -> bool:
    return _capability(device) >= (8, 0)


_capability = cache(torch.cuda.get_device_capability)  # asked for in every call


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
    return ops.attend(NAME, query, key, value, Reading(pattern, scaling, key_mask, global_tokens))


def forward_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    key_mask: Tensor | None,
    documents: Tensor,
    *,
    scaling: float,
) -> Tensor:
    """As `forward`, of a batch that is one row of documents of which each is a part of an input with this pattern.
    Documents take whole blocks, and fill the row.

    Args:
        documents: `int32`, `[documents, 3]`: of each, the place in the row where the input's first block would stand,
            the first block of the input that is there, and the end of them.
    """
    return ops.attend(NAME, query, key, value, Reading(pattern, scaling, key_mask, documents=documents))


def attend(query: Tensor, key: Tensor, value: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """Contexts and log-sum-exps, see `ops.Kernels`."""
    call = _make_call(query, reading)
    inputs = tuple(call.extended(tensor) for tensor in (query, key, value))
    output, log_sum_exp = torch.empty_like(inputs[0]), inputs[0].new_empty(inputs[0].shape[:-1], dtype=torch.float32)
    parts, lse_parts = _empty_parts(call, output), _empty_parts(call, log_sum_exp)
    _launch(forward_kernel, call, call.reads, *inputs, output, log_sum_exp, parts, lse_parts)
    _merge(call, parts[None], output[None], lse_parts, log_sum_exp)
    if call.copies is None:
        return output, log_sum_exp
    return call.copies.put_back(output), call.copies.put_back(log_sum_exp)


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum_exp: Tensor, reading: Reading
) -> Tensor:
    """Those of queries, keys and values, see `ops.Kernels`."""
    call = _make_call(query, reading)
    copies = call.copies
    inputs = tuple(call.extended(tensor) for tensor in (query, key, value))
    output, log_sum_exp = call.extended(output), call.extended(log_sum_exp)
    grad = grad.contiguous() if copies is None else copies.move_from(grad)
    if copies is not None and call.key_mask is not None:  # what is no token reads nothing
        log_sum_exp = log_sum_exp.masked_fill(~call.key_mask[..., None], HUGE.value)
    grads, parts = output.new_empty(3, *output.shape), _empty_parts(call, output, 3)
    known = (log_sum_exp, grad, torch.empty_like(log_sum_exp))
    _launch(query_gradient_kernel, call, call.reads, *inputs, output, *known, grads[0], parts[0])
    _launch(key_gradient_kernel, call, call.read_by, *inputs, *known, *grads[1:], *parts[1:])
    _merge(call, parts, grads)
    return grads if copies is None else torch.stack([copies.add_back(tensor) for tensor in grads])


ops.KERNELS[NAME] = ops.Kernels(attend, gradients)


def _count_segments(pattern: BlockPattern, copies: int) -> int:
    """In how many segments to cut long lists, so that none takes longer than all the rest, for so many sequences and
    heads."""
    work = 8 * copies * pattern.num_blocks  # a block reads about 8
    return -(-pattern.num_blocks // max(SHORTEST_SEGMENT, work // PROGRAMS))


class _Call(NamedTuple):
    """What the kernels of a call have in common.

    reads, read_by: the lists of blocks.
    copies: single global tokens; None for none.
    key_mask: `bool`, `[batch, length]`, False for padding and for what is no token; None where there is none.
    read_copies: see `Copies.read_by`.
    documents, num_documents: those that are packed, or None, and how many there are in either case.
    scale: of the scores, to base 2.
    is_causal: whether a token reads no later one.
    sizes: what the kernels are compiled for.
    """

    reads: WalkLists
    read_by: WalkLists
    copies: Copies | None
    key_mask: Tensor | None
    read_copies: Tensor | None
    documents: Tensor | None
    num_documents: int
    scale: float
    is_causal: bool
    sizes: dict[str, int]

    def extended(self, tensor: Tensor) -> Tensor:
        """A tensor of the input, contiguous, with the single global tokens behind it."""
        return tensor.contiguous() if self.copies is None else self.copies.add_to(tensor)


def _make_call(query: Tensor, reading: Reading) -> _Call:
    heads, head_dim = query.shape[2:]
    pattern, documents, key_mask = reading.pattern, reading.documents, reading.key_mask
    num_documents = query.shape[0] if documents is None else len(documents)
    copies, read_copies, extra_blocks = Copies.of(reading, query.shape[1]), None, 0
    if copies is not None:
        extra_blocks, key_mask = copies.num_blocks, copies.key_mask(key_mask)
    segments = _count_segments(pattern, num_documents * heads)
    reads, read_by = make_lists(pattern, segments, query.device, extra_blocks)
    if copies is not None:
        read_copies = copies.read_by(reads)
    sizes = _sizes(heads, head_dim, pattern.block_size, query.element_size())
    scale = reading.scaling * LOG2_E.value
    return _Call(
        *(reads, read_by, copies, key_mask, read_copies, documents, num_documents),
        *(scale, pattern.is_causal, sizes),
    )


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


def _launch(
    kernel, call: _Call, lists: WalkLists, query: Tensor, key: Tensor, value: Tensor, *tensors: Tensor
) -> None:
    """Runs a kernel for all lists."""
    sizes, extra_blocks = call.sizes, 0 if call.copies is None else call.copies.num_blocks
    grid = (call.num_documents * sizes["HEADS"], len(lists.rows) * (sizes["BLOCK"] // sizes["TILE"]))
    with torch.cuda.device_of(query):
        kernel[grid](
            *(query, key, value, call.key_mask, call.read_copies, call.documents),
            *tensors,
            *lists.tensors,
            *(lists.num_blocks, lists.num_long, lists.segments, extra_blocks),
            call.scale,
            **sizes,
            LAYOUTS=lists.starts.shape[0],
            IS_CAUSAL=call.is_causal,
            PRECISION=_precision(),
            num_stages=2,
            num_warps=_count_warps(kernel, query.element_size() * sizes["WIDTH"]),
        )


def _count_warps(kernel, row_bytes: int) -> int:
    """How many share a program. With four, gradients of wide heads in float32 hold more than fits in the registers.
    (In half precision eight would spill less, but cut the tiles of Hopper's products in two.)"""
    return 8 if kernel is not forward_kernel and row_bytes > 256 else 4


def _precision() -> str:
    """That of products in float32, as the user has set it for all of torch's. (From torch 2.9 on reading the older of
    two settings is an error once the newer one was used.)"""
    matmul = torch.backends.cuda.matmul
    allows_tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allows_tf32 else "tf32x3"


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
