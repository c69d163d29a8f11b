"""The normalised sum at the end of each half of a layer, `norm(states + residual)`: in training on NVIDIA's GPUs by
one kernel forward and one backward. The bias of the projection before it is added on the way, and its gradient, a sum
over all tokens, comes with those of the norm. Elsewhere torch's own operators compute it, which are the definition.
"""

from functools import cache
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .attention.common import has_free_shapes, is_exporting, is_transformed
from .cpu import is_plain, is_watched, linear

FEWEST_NUMBERS = 2**23
"""In the states, at least: with fewer, a large GPU waits for Python, of which the kernels ask more than torch's
operators."""

MOST_COLUMNS = 4096
"""That a program keeps in its registers."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norm_of_sum(norm: nn.Module, states: Tensor, residual: Tensor) -> Tensor:
    """`norm(states + residual)`, of and to `[..., width]`.

    Args:
        norm: an `nn.LayerNorm`, or what stands in the place of one. Only a plain one, not watched by hooks, is taken
            to the kernels.
    """
    if _suits(norm, states, residual):
        return _run(norm, states, residual, None)
    return norm(states + residual)


def norm_of_product(norm: nn.Module, layer: nn.Module, states: Tensor, residual: Tensor) -> Tensor:
    """`norm(layer(states) + residual)`, `[..., width]`.

    Args:
        norm: see `norm_of_sum`.
        layer: an `nn.Linear`, or what stands in the place of one.
        states: `[..., layer.in_features]`.
        residual: `[..., width]`.
    """
    if not _suits(norm, states, residual):
        return norm(linear(layer, states, residual=residual))
    if is_plain(layer) and layer.bias is not None:
        return _run(norm, nn.functional.linear(states, layer.weight), residual, layer.bias)
    return _run(norm, linear(layer, states), residual, None)


def _suits(norm: nn.Module, states: Tensor, residual: Tensor) -> TypeGuard[nn.LayerNorm]:
    """Whether the kernels can take the place of `norm`. (In training mode rather than where gradients are wanted:
    gradient checkpointing computes all once without them.)"""
    if has_free_shapes() or is_exporting() or is_transformed() or _kernels(residual.device) is None:
        return False
    width = residual.shape[-1]
    if not norm.training or residual.numel() < FEWEST_NUMBERS or width > MOST_COLUMNS:
        return False
    if type(norm) is not nn.LayerNorm or is_watched(norm) or norm.normalized_shape != (width,):
        return False
    return norm.weight is not None and norm.bias is not None and _are_plain(states, residual, norm.weight, norm.bias)


def _are_plain(*tensors: Tensor) -> bool:
    """Whether these are tensors in one place, of dtypes that go together: under autocast all do."""
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return False
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        return False
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    is_one = len(kinds) == 1 or torch.is_autocast_enabled("cuda")
    return is_one and len({device for device, _ in kinds}) == 1 and all(dtype in DTYPES for _, dtype in kinds)


@cache
def _kernels(device: torch.device):
    """The module of the kernels; None where they do not run."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from . import layer_norm_kernels
    except ImportError:  # torch need not have Triton
        return None
    return layer_norm_kernels


def _run(norm: nn.LayerNorm, states: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.float32 if torch.is_autocast_enabled("cuda") else states.dtype
    kernels = _kernels(residual.device)
    return _NormOfSum.apply(states, residual, bias, norm.weight, norm.bias, norm.eps, dtype, kernels)


class _NormOfSum(torch.autograd.Function):
    """`layer_norm(states + residual + bias)` in a dtype, by kernels."""

    @staticmethod
    def forward(ctx, states, residual, bias, weight, shift, eps, dtype, kernels):
        output, *statistics = kernels.forward(states, residual, bias, weight, shift, eps, dtype)
        ctx.save_for_backward(states, residual, bias, weight, shift, *statistics)
        ctx.eps, ctx.dtype, ctx.kernels = eps, dtype, kernels
        return output

    @staticmethod
    def backward(ctx, grad):
        *inputs, means, factors = ctx.saved_tensors
        needs = ctx.needs_input_grad[: len(inputs)]
        if torch.is_grad_enabled():  # create_graph=True: what comes out is to be differentiated again
            grads = _gradients_by_torch(grad, inputs, needs, eps=ctx.eps, dtype=ctx.dtype)
        else:
            of_sum, of_parameters = ctx.kernels.gradients(grad, *inputs[:-1], means, factors)
            found = (of_sum, of_sum, *of_parameters)
            grads = [
                one.to(tensor.dtype) if is_needed else None
                for one, tensor, is_needed in zip(found, inputs, needs, strict=True)
            ]
        return *grads, None, None, None


def definition(states, residual, bias, weight, shift, eps: float, dtype: torch.dtype) -> Tensor:
    """The same by torch's own operators."""
    total = states + residual if bias is None else states + bias + residual
    return nn.functional.layer_norm(total.to(dtype), weight.shape, weight.to(dtype), shift.to(dtype), eps)


def _gradients_by_torch(grad, inputs, needs, **how) -> list[Tensor | None]:
    """Those of the inputs, which have gradients themselves."""
    wanted = [tensor for tensor, is_needed in zip(inputs, needs, strict=True) if is_needed]
    grads = iter(torch.autograd.grad(definition(*inputs, **how), wanted, grad, create_graph=True))
    return [next(grads) if is_needed else None for is_needed in needs]
