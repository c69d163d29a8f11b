"""What an engine of kernels is to autograd and to `torch.compile`.

Such an engine is a pair of functions on `[batch, length, heads, dim]`: `attend`, which gives the context and the
log-sum-exp of the scores, and `gradients`. Here they become one differentiable function, which in graphs of
`torch.compile` is an operator that stands for whatever the engine does.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .common import score_dtype
from .global_tokens import GlobalTokens
from .impl import reference
from .pattern import BlockPattern, Origin


class Reading(NamedTuple):
    """Who reads whom.

    pattern: which block reads which.
    scaling: what the scores are multiplied by.
    key_mask: `bool`, `[batch, length]`, False for padding; None where there is none.
    global_tokens: tokens that read everything and are read by all; None for none.
    documents: `int32`, `[documents, 3]`, where the batch is one row of documents, see `triton.forward_documents`.
    """

    pattern: BlockPattern
    scaling: float
    key_mask: Tensor | None = None
    global_tokens: GlobalTokens | None = None
    documents: Tensor | None = None


class Kernels(NamedTuple):
    """An engine's pair of functions.

    attend: `(query, key, value, reading) -> (context, log_sum_exp)`; the last is `[batch, length, heads]`, in
        `score_dtype`.
    gradients: `(grad, query, key, value, context, log_sum_exp, reading)` -> those of query, key and value, one behind
        the other: `[3, batch, length, heads, dim]`.
    """

    attend: Callable[..., tuple[Tensor, Tensor]]
    gradients: Callable[..., Tensor]


KERNELS: dict[str, Kernels] = {}
"""By the names under which graphs hold them."""


def attend(name: str, query: Tensor, key: Tensor, value: Tensor, reading: Reading) -> Tensor:
    """The context, `[batch, heads, length, head_dim]`, of tensors of that shape, by the kernels of that name."""
    tensors = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    if torch.compiler.is_compiling():
        context, _ = torch.ops.bigbird_plus.attention(*tensors, *_as_arguments(name, reading))
    else:
        context = _Attention.apply(*tensors, KERNELS[name], reading)
    return context.transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, kernels, reading):
        context, log_sum_exp = kernels.attend(query, key, value, reading)
        ctx.save_for_backward(query, key, value, context, log_sum_exp)
        ctx.kernels, ctx.reading = kernels, reading
        return context

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True: what comes out is to be differentiated again
            return *_gradients_by_definition(grad, *ctx.saved_tensors[:3], ctx.reading), None, None
        return *ctx.kernels.gradients(grad, *ctx.saved_tensors, ctx.reading).unbind(), None, None


def _gradients_by_definition(grad, query, key, value, reading: Reading) -> list[Tensor | None]:
    """Those that have gradients themselves, by the quadratic definition."""
    if reading.documents is not None:
        raise RuntimeError(
            "Second derivatives of a batch of documents without their padding need attn_implementation='eager'."
        )
    pattern, scaling, key_mask, tokens, _ = reading
    asked, keys, values = (tensor.transpose(1, 2) for tensor in (query, key, value))
    context = reference.forward(asked, keys, values, pattern, key_mask, tokens, scaling=scaling).transpose(1, 2)
    inputs = [tensor for tensor in (query, key, value) if tensor.requires_grad]
    grads = iter(torch.autograd.grad(context, inputs, grad, create_graph=True))
    return [next(grads) if tensor.requires_grad else None for tensor in (query, key, value)]


# ---------------------------------------------------------------------------------------------------------------------
# The same in graphs, in which patterns are what they are made of
# ---------------------------------------------------------------------------------------------------------------------

# torch 2.6 cannot make the schemas of `list[int]`.
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? global_places, Tensor? is_global, "
    "SymInt num_extra, SymInt[] settings, SymInt[]? indices, str? blocks, SymInt num_blocks, SymInt? layer_idx, "
    "bool is_causal, SymInt[]? heads, float scaling, str kernels"
)
_TENSORS = 6


@torch.library.custom_op(
    "bigbird_plus::attention", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor context, Tensor log_sum_exp)"
)
def _attention(query, key, value, *arguments) -> tuple[Tensor, Tensor]:
    *reading, name = arguments
    return KERNELS[name].attend(query, key, value, _from_arguments(*reading))


@_attention.register_fake
def _(query, *others):
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=score_dtype(query))


@torch.library.custom_op(
    "bigbird_plus::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, Tensor context, Tensor log_sum_exp) -> Tensor",
)
def _attention_backward(grad, query, key, value, *arguments) -> Tensor:
    *reading, name, context, log_sum_exp = arguments
    return KERNELS[name].gradients(grad, query, key, value, context, log_sum_exp, _from_arguments(*reading))


@_attention_backward.register_fake
def _(grad, query, *others):
    return query.new_empty(3, *query.shape)


def _save_for_gradients(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.others = inputs[_TENSORS:]


def _differentiate(ctx, grad, _):
    inputs, output = ctx.saved_tensors[:_TENSORS], ctx.saved_tensors[_TENSORS:]
    grads = torch.ops.bigbird_plus.attention_backward(grad, *inputs, *ctx.others, *output)
    return *grads.unbind(), *[None] * (len(inputs) + len(ctx.others) - 3)


_attention.register_autograd(_differentiate, setup_context=_save_for_gradients)


def _as_arguments(name: str, reading: Reading) -> tuple:
    """What the operator takes behind queries, keys and values. Random blocks are drawn within it: a tensor of them, on
    the CPU, would keep graphs from being captured."""
    tokens, origin = reading.global_tokens, cast(Origin, reading.pattern.origin)
    tensors = (None, None, 0) if tokens is None else tokens
    return reading.key_mask, *tensors, *origin, reading.scaling, name


def _from_arguments(key_mask, places, is_token, num_extra, *arguments) -> Reading:
    """The reverse; the same pattern for the same arguments."""
    *origin, scaling = arguments
    tokens = None if places is None else GlobalTokens(places, is_token, num_extra)
    return Reading(Origin(*origin).pattern(), scaling, key_mask, tokens)
