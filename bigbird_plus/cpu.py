"""What makes layers faster on a CPU: linear layers by oneDNN's matrix product where that is the faster one, in float32
where the processor has no instructions for half precision, a feed-forward part that keeps what its gradients need, and
parts of a layer that take each token by itself, done for some tokens after others.

torch carries two matrix products for CPUs. In float32 it takes MKL's, which on AMD's processors does not use their
512-bit instructions and then runs at a good half of the speed of oneDNN's; without those instructions it is the faster
one. Which of them runs here depends on the processor and the dtype alone, never on a timing: results do not vary from
process to process.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .attention.common import (
    EMULATED,
    HALF_PRECISION,
    chunks,
    is_exporting,
    is_tracing,
    is_transformed,
    per_chunk,
)
from .int8 import Int8Linear, products


class TanhGELU(nn.Module):
    """GELU in its tanh approximation, which oneDNN computes together with the product before it."""

    def forward(self, states: Tensor) -> Tensor:
        """Of the same shape."""
        return nn.functional.gelu(states, approximate="tanh")


NUMBERS_IN_CACHE = 2**18
"""How many are taken through several operations together."""


def linear(layer: nn.Module, states: Tensor, activation=None, residual: Tensor | None = None) -> Tensor:
    """`activation(layer(states)) + residual`, each of the two where it is given.

    Args:
        layer: an `nn.Linear`, or what stands in the place of one: an adapter, a quantized layer. Only a plain one, not
            watched by hooks, is taken to the faster product.
        states: `[..., in_features]`.
        activation: a function of one tensor. Only a plain `TanhGELU` is computed together with the product.
        residual: `[..., out_features]`.

    Returns:
        `[..., out_features]`.
    """
    states, activation, residual = _product(layer, states, activation, residual)
    if activation is not None:
        states = activation(states)
    return states if residual is None else states + residual


def linears(layers: Sequence[nn.Module], states: Tensor) -> list[Tensor]:
    """`[linear(layer, states) for layer in layers]`, of layers with as many inputs. Those in int8 quantize the states
    once."""
    if all(type(layer) is Int8Linear and not is_watched(layer) for layer in layers):
        return products(layers, states)
    return [linear(layer, states) for layer in layers]


def _product(layer, states, activation, residual):
    """The product, together with what can be computed with it, and what is left to do: activation and residual."""
    if is_exporting():
        # As a matrix: to merge dimensions itself, torch would ask what it cannot know of a free length (see `_reshape`
        # of the attention).
        *sizes, features = states.shape
        rows = states.reshape(-1).view(math.prod(sizes), features)
        return layer(rows).unflatten(0, sizes), activation, residual
    is_gelu = type(activation) is TanhGELU and not is_watched(activation)
    if not is_plain(layer):
        is_int8 = type(layer) is Int8Linear and states.dtype is torch.float32 and not is_watched(layer)
        if is_int8 and is_gelu and not is_tracing() and not is_transformed():
            return _tanh_gelu_in_place(layer(states)), None, residual
        return layer(states), activation, residual
    if converts(layer, states):
        return _converted(layer, states, activation, residual, is_gelu)
    if not _suits(layer.weight, states):
        return layer(states), activation, residual
    fuses_gelu = is_gelu and residual is None and not torch.is_grad_enabled()
    if states.device.type != "cpu":
        if fuses_gelu and _has_product_with_gelu(layer, states):
            return _product_with_gelu(layer, states), None, None
        return layer(states), activation, residual
    if not prefers_onednn(states):
        if fuses_gelu and states.dtype is torch.float32 and not is_tracing() and not is_transformed():
            return _tanh_gelu_in_place(layer(states)), None, None
        return layer(states), activation, residual
    if torch.is_grad_enabled():
        return _OneDnnLinear.apply(states, layer.weight, layer.bias), activation, residual
    if fuses_gelu:
        return onednn_product(states, layer.weight, layer.bias, "gelu", "tanh"), None, None
    return onednn_product(states, layer.weight, layer.bias), activation, residual


# ---------------------------------------------------------------------------------------------------------------------
# Half precision without instructions for it
# ---------------------------------------------------------------------------------------------------------------------


FEW_ROWS = 8
"""For fewer rows, as in decoding, converting the weights takes longer than torch's emulated product."""


def converts(layer: nn.Linear, states: Tensor) -> bool:
    """Whether a product in half precision is computed in float32, see `common.EMULATED`."""
    if states.device.type != "cpu" or is_tracing() or is_transformed():
        return False
    if states.numel() < FEW_ROWS * states.shape[-1]:
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") in EMULATED and states.dtype is not torch.float64
    return states.dtype in EMULATED and _suits(layer.weight, states)


def _converted(layer, states, activation, residual, is_gelu):
    """See `_product`."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled():
            return _ConvertedLinear.apply(states, layer.weight, layer.bias, dtype), activation, residual
        if activation is not None and not is_gelu:
            return _converted_product(states, layer.weight, layer.bias, dtype), activation, residual
        if residual is not None:  # under autocast the sum keeps the precision of the states
            dtype = torch.promote_types(dtype, residual.dtype)
        return _converted_product(states, layer.weight, layer.bias, dtype, is_gelu, residual), None, None


def _converted_product(states, weight, bias, dtype, is_gelu=False, residual=None) -> Tensor:
    """`activation(states weight^T + bias) + residual` in `dtype`, computed in float32: some outputs after others, of
    some rows after others, so that what is converted takes little memory, and is used while it is in the cache."""
    inputs, outputs = weight.shape[1], weight.shape[0]
    rows = states.reshape(-1, inputs)
    result = torch.empty(len(rows), outputs, dtype=dtype)
    residual = None if residual is None else residual.reshape(-1, outputs)
    multiply = onednn_product if float32_is_onednn() else nn.functional.linear
    for columns in chunks(0, outputs, per_chunk(inputs * torch.float32.itemsize)):
        taken = slice(columns.start, columns.stop)
        own_weight, own_bias = weight[taken].float(), None if bias is None else bias[taken].float()
        for some in chunks(0, len(rows), per_chunk(max(inputs, len(columns)) * torch.float32.itemsize)):
            where = slice(some.start, some.stop)
            product = multiply(rows[where].float(), own_weight, own_bias)
            if is_gelu:
                product = _tanh_gelu_in_place(product)
            if residual is not None:
                product += residual[where, taken]
            result[where, taken] = product
    return result.view(*states.shape[:-1], outputs)


class _ConvertedLinear(torch.autograd.Function):
    """`states weight^T + bias` in a dtype, with its gradients, computed in float32."""

    @staticmethod
    def forward(ctx, states, weight, bias, dtype):
        ctx.save_for_backward(states, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _converted_product(states, weight, bias, dtype)

    @staticmethod
    def backward(ctx, grad):
        states, weight = ctx.saved_tensors
        needs_states, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grad.float()
        rows = grad.flatten(0, -2)
        return (
            (grad @ weight.float()).to(states.dtype) if needs_states else None,
            (rows.t() @ states.flatten(0, -2).float()).to(weight.dtype) if needs_weight else None,
            rows.sum(0).to(ctx.bias_dtype) if needs_bias else None,
            None,
        )


# ---------------------------------------------------------------------------------------------------------------------
# oneDNN's products
# ---------------------------------------------------------------------------------------------------------------------


def prefers_onednn(states: Tensor) -> bool:
    """Whether products with these states are oneDNN's rather than torch's default."""
    if states.device.type != "cpu" or is_tracing() or is_transformed():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    if states.dtype is torch.float32:
        return float32_is_onednn()
    # the same product as by default, but together with the activation
    is_native = states.dtype in HALF_PRECISION and states.dtype not in EMULATED
    return is_native and not torch.is_grad_enabled() and has_onednn()


@cache
def has_onednn() -> bool:
    """Whether this torch has the operators, which are not part of its public interface."""
    try:
        one = torch.ones(1, 1)
        return torch.backends.mkldnn.is_available() and onednn_product(one, one, None).item() == 1
    except (AttributeError, RuntimeError, TypeError):
        return False


@cache
def float32_is_onednn() -> bool:
    """Whether oneDNN's product in float32 is faster here than torch's default."""
    try:
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return is_amd and torch.backends.cpu.get_cpu_capability() == "AVX512" and has_onednn()


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling `layer` is nothing but a product with its weight."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not is_watched(layer)


def _suits(weight: Tensor, states: Tensor) -> bool:
    return weight.dtype == states.dtype and weight.device == states.device and states.numel() > 0


def _has_product_with_gelu(layer: nn.Linear, states: Tensor) -> bool:
    """Whether CUDA's product computes the activation, too. The operator is not part of torch's public interface."""
    is_cuda = states.device.type == "cuda" and not torch.is_autocast_enabled("cuda")
    return is_cuda and layer.bias is not None and hasattr(torch, "_addmm_activation")


def _product_with_gelu(layer: nn.Linear, states: Tensor) -> Tensor:
    product = torch._addmm_activation(layer.bias, states.flatten(0, -2), layer.weight.t(), use_gelu=True)
    return product.unflatten(0, states.shape[:-1])


def _tanh_gelu_in_place(states: Tensor) -> Tensor:
    """`x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))`, which is the same, for as many rows at a time as stay in the
    cache. Torch's own kernel takes twice as long, for its tanh."""
    factor = torch.tensor(_GELU_FACTOR)
    for rows in states.view(-1, states.shape[-1]).split(max(1, NUMBERS_IN_CACHE // states.shape[-1])):
        rows.mul_(torch.addcmul(factor, rows, rows, value=_GELU_CUBIC).mul_(rows).sigmoid_())
    return states


_GELU_FACTOR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_FACTOR


def onednn_product(states: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", algorithm: str = ""):
    """oneDNN's `activation(states weight^T + bias)`."""
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, activation, [], algorithm)


class _OneDnnLinear(torch.autograd.Function):
    """`states weight^T + bias`, with its gradients."""

    @staticmethod
    def forward(ctx, states, weight, bias):
        ctx.save_for_backward(states, weight)
        return onednn_product(states, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        states, weight = ctx.saved_tensors
        needs_states, *needs_others = ctx.needs_input_grad
        return (_of_states(grad, weight) if needs_states else None, *_of_parameters(grad, states, *needs_others))


def _of_states(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of what is multiplied with a weight, from that of the product."""
    # With create_graph=True gradients are differentiated again, which oneDNN's products are not.
    if torch.is_grad_enabled() or not float32_is_onednn():
        return grad @ weight
    return onednn_product(grad.contiguous(), weight.t().contiguous(), None)


def _of_parameters(grad: Tensor, states: Tensor, needs_weight: bool, needs_bias: bool):
    """The gradients of weight and bias, each where it is wanted."""
    rows = grad.reshape(-1, grad.shape[-1])  # not `flatten`, which gradients of a batch at once have not
    of_weight = rows.t() @ states.reshape(-1, states.shape[-1]) if needs_weight else None
    return of_weight, rows.sum(0) if needs_bias else None


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def trains_as_one(first: nn.Module, activation, second: nn.Module, states: Tensor) -> bool:
    """Whether `feed_forward` can take the place of two layers and the activation between them, which saves time where
    gradients are wanted."""
    if states.device.type != "cpu" or not torch.is_grad_enabled() or is_tracing() or is_transformed():
        return False
    if states.dtype is not torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if type(activation) is not TanhGELU or is_watched(activation):
        return False
    if forward_ad.unpack_dual(states).tangent is not None:
        return False
    if not all(is_plain(layer) and _suits(layer.weight, states) for layer in (first, second)):
        return False
    return any(tensor.requires_grad for tensor in (states, *first.parameters(), *second.parameters()))


def feed_forward(first: nn.Linear, second: nn.Linear, states: Tensor) -> Tensor:
    """`second(TanhGELU()(first(states)))`, of and to `[..., width]`."""
    return _FeedForward.apply(states, first.weight, first.bias, second.weight, second.bias)


class _FeedForward(torch.autograd.Function):
    """Two products, and GELU between them. Its derivative is computed with it, and written over the first product,
    which nothing else needs."""

    @staticmethod
    def forward(ctx, states, first, first_bias, second, second_bias):
        multiply = onednn_product if float32_is_onednn() else nn.functional.linear
        product = multiply(states, first, first_bias)
        activated = torch.empty_like(product)
        _tanh_gelu_and_derivative(product, activated)
        needs = ctx.needs_input_grad
        kept = (activated if needs[3] else None, product if any(needs[:3]) else None)
        ctx.save_for_backward(states, first, first_bias, second, second_bias, *kept)
        return multiply(activated, second, second_bias)

    @staticmethod
    def backward(ctx, grad):
        *inputs, activated, derivative = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: what comes out is to be differentiated again
            return _gradients_by_torch(grad, inputs, needs)
        states, first, _, second, _ = inputs
        inner = _of_states(grad, second).mul_(derivative) if any(needs[:3]) else None
        return (
            _of_states(inner, first) if needs[0] else None,
            *(_of_parameters(inner, states, *needs[1:3]) if any(needs[1:3]) else (None, None)),
            *_of_parameters(grad, activated, *needs[3:]),
        )


def _gradients_by_torch(grad, inputs, needs) -> tuple[Tensor | None, ...]:
    """Those of `_FeedForward`, which have gradients themselves."""
    states, first, first_bias, second, second_bias = inputs
    activated = nn.functional.gelu(nn.functional.linear(states, first, first_bias), approximate="tanh")
    result = nn.functional.linear(activated, second, second_bias)
    wanted = [tensor for tensor, is_needed in zip(inputs, needs, strict=True) if is_needed]
    grads = iter(torch.autograd.grad(result, wanted, grad, create_graph=True))
    return tuple(next(grads) if is_needed else None for is_needed in needs)


def _tanh_gelu_and_derivative(states: Tensor, activated: Tensor) -> None:
    """Writes the activation to `activated`, and its derivative over `states`, for as many rows at a time as stay in
    the cache. With `x s`, `s = sigmoid(z)`, for the activation (see `_tanh_gelu_in_place`), that is
    `s + x s (1 - s) dz/dx`."""
    factor = torch.tensor(_GELU_FACTOR)
    size, width = max(1, NUMBERS_IN_CACHE // states.shape[-1]), states.shape[-1]
    for rows, results in zip(states.view(-1, width).split(size), activated.view(-1, width).split(size), strict=True):
        sigmoid = torch.addcmul(factor, rows, rows, value=_GELU_CUBIC).mul_(rows).sigmoid_()
        inner = torch.addcmul(factor, rows, rows, value=3 * _GELU_CUBIC)
        torch.mul(rows, sigmoid, out=results)
        torch.addcmul(results, results, sigmoid, value=-1, out=rows)
        rows.mul_(inner).add_(sigmoid)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens after tokens
# ---------------------------------------------------------------------------------------------------------------------


def in_chunks(function, *tensors: Tensor, width: int, modules: Iterable[nn.Module]) -> Tensor:
    """`function(*tensors)`; on a CPU, in evaluation and without gradients, for some tokens after others.

    In training it is called once: gradient checkpointing needs the same dropout with and without gradients.

    Args:
        function: from tensors of `[batch, tokens, ...]` to `[batch, tokens, ...]`, each token by itself.
        tensors: `[batch, length, ...]`.
        width: how many numbers `function` makes of a token at most.
        modules: those that `function` calls. Where hooks watch them, they are called once for all tokens.
    """
    if tensors[0].device.type != "cpu" or torch.is_grad_enabled() or is_tracing() or is_transformed():
        return function(*tensors)  # before the sizes are asked for: graphs are for any
    batch, length = tensors[0].shape[:2]
    size = per_chunk(batch * width * torch.float32.itemsize)
    if size >= length or any(module.training or is_watched(module) for module in modules):
        return function(*tensors)
    for piece in chunks(0, length, size):
        part = function(*(tensor[:, piece.start : piece.stop] for tensor in tensors))
        if piece.start == 0:
            result = part.new_empty(part.shape[0], length, *part.shape[2:])
        result[:, piece.start : piece.stop] = part
    return result


def is_watched(module: nn.Module) -> bool:
    """Whether somebody would notice how often `module` or a part of it is called, or on what."""
    return any(
        "forward" in part.__dict__
        or part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        for part in module.modules()
    )
