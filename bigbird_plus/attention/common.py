"""What the engines and the plan have in common: what Python may ask of a tensor, dtypes and masks of scores, blocks,
the merge of partial attentions, and how much is done at once on a CPU."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor, nn

CHUNK_BYTES = 16 * 2**20
"""How much is computed at once on a CPU. malloc keeps memory for its next use, but gives large pieces (glibc: over 32
MiB, or several that become free together) back to the system, which clears each page before it lends it again: that
takes longer than to write to it. Pieces of half that size use the same memory over and over."""

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
"""Whether a graph is being made that is to leave the process, by `torch.export` or `torch.onnx.export`. (torch 2.6
does not tell.)"""


def has_free_shapes() -> bool:
    """Whether a graph is being made that may serve other shapes: by `torch.compile`, `torch.export` or
    `torch.jit.trace`."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_capturing() -> bool:
    """Whether a CUDA graph is being made. Not to be asked under `torch.compile`, which fails at that."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_tracing() -> bool:
    """Whether a graph is being made of what happens, in which values are not known: one of those, or CUDA's."""
    return has_free_shapes() or is_capturing()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, jvp) is at work, which takes torch's own operators only."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def may_read_values(tensor: Tensor) -> bool:
    """Whether Python may look at a tensor's values: not while a graph is traced or `torch.func` transforms, and not
    where it would wait for a device."""
    return tensor.device.type == "cpu" and not is_tracing() and not is_transformed()


def may_wait_for(tensor: Tensor) -> bool:
    """Whether Python may look at a tensor's values even if it has to wait for a GPU to do so, which is for decisions
    that are worth that, once a call. Not on a stream of the caller's own: CUDA graphs are captured there and, before
    that, warmed up. While they are captured values are not known, and kernels cannot be loaded, so that the warm-up
    must have run the very same ones."""
    if tensor.is_meta or is_tracing() or is_transformed():
        return False
    return not tensor.is_cuda or _is_on_default_stream(tensor.device)


def _is_on_default_stream(device: torch.device) -> bool:
    return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor there. If it was made on the CPU, no GPU is waited for: that would leave it without work afterwards."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def keep_on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """As `to_device`, of what is kept for later calls, in memory that another thread takes: graphs of
    `torch.compile(mode="reduce-overhead")` own what theirs takes as they warm up, and refuse what outlives that."""
    if device.type != "cuda":
        return to_device(tensor, device)
    with ThreadPoolExecutor(1) as thread:
        kept, copied = thread.submit(_copy, tensor, device).result()
    torch.cuda.current_stream(device).wait_event(copied)
    return kept


def _copy(tensor, device):
    return to_device(tensor, device), torch.cuda.current_stream(device).record_event()


def _is_emulated(dtype: torch.dtype, question: str) -> bool:
    level = torch.backends.cpu.get_cpu_capability()
    if level not in ("DEFAULT", "AVX2", "AVX512"):
        return False  # another kind of processor
    if not getattr(torch.ops.mkldnn, question, lambda: False)():
        return True
    # With AVX-512 oneDNN has bfloat16 in any case, but emulates it where instructions for it are missing, too.
    return dtype is torch.bfloat16 and level == "AVX512" and not torch.cpu._is_avx512_bf16_supported()


HALF_PRECISION = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""The dtypes, each with the question whether oneDNN has products for it on this processor."""

EMULATED = {dtype for dtype, question in HALF_PRECISION.items() if _is_emulated(dtype, question)}
"""Those for whose products this processor has no instructions. torch emulates them then, in three to ten times the
time that float32 takes."""


def attention_dtype(tensor: Tensor) -> torch.dtype:
    """In what attention is computed: float32 instead of what a CPU would emulate."""
    converts = tensor.device.type == "cpu" and tensor.dtype in EMULATED and not is_tracing() and not is_transformed()
    return torch.float32 if converts else tensor.dtype


def score_dtype(tensor: Tensor) -> torch.dtype:
    """Scores are kept in float32 at least: adding a mask's large negative number to a float16 score overflows."""
    return torch.promote_types(tensor.dtype, torch.float32)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where `mask` is True, the least finite number elsewhere, so that a row with nothing
    to read stays finite."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def causal_mask(query_positions: Tensor, key_length: int) -> Tensor:
    """`bool`, `[queries, keys]`: whether a query at a position of the sequence may read a key."""
    keys = torch.arange(key_length, device=query_positions.device)
    return keys <= query_positions[:, None]


def count_blocks(length: int, block_size: int) -> int:
    """Blocks that so many tokens fill, the last one perhaps in part. (Not `-(-length // block_size)`: divisions round
    towards zero in ONNX.)"""
    return (length + block_size - 1) // block_size


def pad_to_blocks(tensor: Tensor, block_size: int, dim: int) -> Tensor:
    """Fills up a dimension with zeros to a multiple of `block_size`."""
    length = tensor.shape[dim]
    missing = count_blocks(length, block_size) * block_size - length
    if not has_free_shapes() and not missing:  # one graph shall serve all lengths
        return tensor
    return nn.functional.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim % tensor.dim()) + [0, missing])


def cut(tensor: Tensor, length: int, dim: int) -> Tensor:
    """`tensor` without what lies beyond `length` in a dimension; itself, not a view of it, if there is nothing."""
    if has_free_shapes():  # a copy in any case, so that one graph serves lengths with and without padding
        return tensor.index_select(dim, torch.arange(length, device=tensor.device))
    return tensor if tensor.shape[dim] == length else tensor.narrow(dim, 0, length)


def merge(output: Tensor, log_sum_exp: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attentions over either, each with its log-sum-exp `[..., 1]`. In place
    of the first."""
    share = torch.sigmoid(other_lse - log_sum_exp)
    torch.logaddexp(log_sum_exp, other_lse, out=log_sum_exp)
    return output.lerp_(other, share.to(output.dtype)), log_sum_exp


def per_chunk(size: int) -> int:
    """How many pieces of `size` bytes each are done at once, at least one."""
    return max(1, CHUNK_BYTES // max(1, size))


def chunks(start: int, stop: int, size: int) -> list[range]:
    """`range(start, stop)` in as few ranges of at most `size` as there can be, all of about one size."""
    count = -(-(stop - start) // size)
    bounds = [start + (stop - start) * index // count for index in range(count)] + [stop]
    return [range(*pair) for pair in pairwise(bounds)]
