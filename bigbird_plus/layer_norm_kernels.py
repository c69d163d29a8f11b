"""Triton's kernels for the normalised sum of two tensors, and for its gradients.

To them tensors are `[rows, width]` and contiguous, statistics `[rows]` and `float32`. All is computed in `float32`.
`COLUMNS` is the width, filled up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PROGRAMS = 1024
"""That share the rows of a backward pass. (The same on all GPUs, as their sums shall be.)"""

FEWEST_ROWS = 8
"""That such a program takes: each has sums of its own, to be added up in the end."""


def forward(
    states: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm(states + residual + bias)` in a dtype, `[..., width]`, and what `gradients` needs: for each row what
    was taken from it, and what the rest was multiplied by."""
    states, residual = states.contiguous(), residual.contiguous()
    output = torch.empty_like(residual, dtype=dtype)
    width = output.shape[-1]
    means, factors = output.new_empty(2, output.numel() // width, dtype=torch.float32)
    with torch.cuda.device_of(output):
        forward_kernel[(len(means),)](
            *(states, residual, bias, weight, shift, output, means, factors, width, eps), **_sizes(width)
        )
    return output, means, factors


def gradients(
    grad: Tensor,
    states: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    means: Tensor,
    factors: Tensor,
) -> tuple[Tensor, Tensor]:
    """That of the sum, `[..., width]`, and those of bias, weight and shift, `float32`, `[3, width]`."""
    grad, states, residual = grad.contiguous(), states.contiguous(), residual.contiguous()
    of_sum = torch.empty_like(residual, dtype=torch.promote_types(states.dtype, residual.dtype))
    num_rows, width = len(means), of_sum.shape[-1]
    rows = max(FEWEST_ROWS, triton.cdiv(num_rows, MOST_PROGRAMS))
    of_parameters = means.new_empty(triton.cdiv(num_rows, rows), 3, width)
    with torch.cuda.device_of(grad):
        backward_kernel[(len(of_parameters),)](
            *(states, residual, bias, weight, grad, means, factors, of_sum, of_parameters),
            *(num_rows, rows, width),
            **_sizes(width),
        )
    return of_sum, of_parameters.sum(0)


def _sizes(width: int) -> dict[str, int]:
    """What the kernels are compiled for."""
    columns = triton.next_power_of_2(width)
    return {"COLUMNS": columns, "num_warps": min(16, max(4, columns // 256))}


@triton.jit
def _load_sum(states, residual, bias, place, columns, width):
    """A row of `states + residual + bias`, the last where it is given, filled up with zeros."""
    is_there = columns < width
    total = tl.load(states + place + columns, mask=is_there, other=0.0).to(tl.float32)
    total += tl.load(residual + place + columns, mask=is_there, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + columns, mask=is_there, other=0.0).to(tl.float32)
    return total


@triton.jit
def forward_kernel(
    states, residual, bias, weight, shift, output, means, factors, width, eps,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """`output` is the sum, normalised, times `weight` plus `shift`; `means` and `factors` are what was taken from each
    row of the sum, and what the rest was multiplied by. A row in each program."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    is_there = columns < width
    total = _load_sum(states, residual, bias, row * width, columns, width)
    mean = tl.sum(total, 0) / width
    centred = tl.where(is_there, total - mean, 0.0)
    factor = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    scale = tl.load(weight + columns, mask=is_there, other=0.0).to(tl.float32)
    result = centred * factor * scale + tl.load(shift + columns, mask=is_there, other=0.0).to(tl.float32)
    tl.store(output + row * width + columns, result.to(output.dtype.element_ty), mask=is_there)
    tl.store(means + row, mean)
    tl.store(factors + row, factor)


@triton.jit
def backward_kernel(
    states, residual, bias, weight, grad_output, means, factors, grad_sum, grad_parameters,
    num_rows, rows_per_program, width,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the sum and, of the rows of each program, those of bias, weight and shift: `grad_parameters` is
    `float32`, `[programs, 3, width]`."""
    program, columns = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    is_there = columns < width
    scale = tl.load(weight + columns, mask=is_there, other=0.0).to(tl.float32)
    of_bias = tl.zeros([COLUMNS], tl.float32)
    of_weight = tl.zeros([COLUMNS], tl.float32)
    of_shift = tl.zeros([COLUMNS], tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, num_rows)):
        place, factor = row * width, tl.load(factors + row)
        total = _load_sum(states, residual, bias, place, columns, width)
        normalised = tl.where(is_there, (total - tl.load(means + row)) * factor, 0.0)
        grad = tl.load(grad_output + place + columns, mask=is_there, other=0.0).to(tl.float32)
        scaled = grad * scale
        along, across = tl.sum(scaled * normalised, 0) / width, tl.sum(scaled, 0) / width
        own = (scaled - normalised * along - across) * factor
        tl.store(grad_sum + place + columns, own.to(grad_sum.dtype.element_ty), mask=is_there)
        of_bias += own
        of_weight += grad * normalised
        of_shift += grad
    sums = grad_parameters + program * 3 * width + columns
    tl.store(sums, of_bias, mask=is_there)
    tl.store(sums + width, of_weight, mask=is_there)
    tl.store(sums + 2 * width, of_shift, mask=is_there)
