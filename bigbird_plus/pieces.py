"""Parts of a layer that take each token by itself, done for some tokens after others."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .attention.common import is_tracing, is_transformed, pieces_at_once, runs


def in_pieces(function, *tensors: Tensor, width: int, modules: Iterable[nn.Module]) -> Tensor:
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
    size = pieces_at_once(batch * width * torch.float32.itemsize)
    if size >= length or any(module.training or is_watched(module) for module in modules):
        return function(*tensors)
    result = None
    for piece in runs(0, length, size):
        part = function(*(tensor[:, piece.start : piece.stop] for tensor in tensors))
        if result is None:
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
