"""A GPU that is none: what is asked of it is computed on the CPU, and counted."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bigbird_plus.attention import global_tokens, masks, parts, plan
from bigbird_plus.attention.impl import triton_lists

aten = torch.ops.aten
DEVICE = torch.device("meta")  # torch without CUDA asks no driver for it


class _OnGPU(torch.Tensor):
    """Says that it is there; `numbers` are on the CPU."""

    @staticmethod
    def __new__(cls, numbers):
        how = {"strides": numbers.stride(), "dtype": numbers.dtype, "device": DEVICE}
        tensor = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **how)
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called outside of the pretended GPU")


class PretendedGPU(TorchDispatchMode):
    """While it is entered, without gradients, `counts` what happens: `"operators"` there, how often its numbers are
    `"waited for"`, and `"blocking copies"` to it; `launched` has the names of those operators that compute."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.launched = Counter()

    def put(self, *tensors: torch.Tensor):
        """Tensors there."""
        return [_OnGPU(tensor) for tensor in tensors]

    def move(self, model: torch.nn.Module) -> torch.nn.Module:
        """A model, whose tensors go there."""
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update(
                    {name: _OnGPU(tensor.detach()) for name, tensor in tensors.items() if tensor is not None}
                )
        return model

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        was_there = any(isinstance(leaf, _OnGPU) for leaf in tree_leaves((args, kwargs)))
        is_there = was_there
        if "device" in kwargs:
            is_there = kwargs["device"] == DEVICE
            kwargs["device"] = "cpu"
        if function is aten._local_scalar_dense.default:
            is_there = False
        self.counts["operators"] += is_there
        if is_there and not _is_free(function):
            self.launched[function.name().removeprefix("aten::").partition(".")[0]] += 1
        self.counts["waited for"] += was_there and not is_there
        if is_there and not was_there and function is aten._to_copy.default:
            self.counts["blocking copies"] += not kwargs.get("non_blocking", False)
        args, kwargs = tree_map(lambda leaf: leaf.numbers if isinstance(leaf, _OnGPU) else leaf, (args, kwargs))
        result = function(*args, **kwargs)
        return (
            tree_map(lambda leaf: _OnGPU(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
            if is_there
            else result
        )


def _is_free(function) -> bool:
    """Whether an operator makes a view, or takes memory, and computes nothing."""
    is_view = any(result.alias_info and not result.alias_info.is_write for result in function._schema.returns)
    return is_view or function._schema.name in ("aten::empty_like", "aten::new_empty", "aten::_unsafe_view")


def make_pretend(monkeypatch):
    """Lets the package take it for a GPU, whose copies need not be waited for."""
    modules = {plan: "to_device", parts: "to_device", global_tokens: "to_device", triton_lists: "keep_on_device"}
    for module, name in modules.items():
        monkeypatch.setattr(module, name, lambda tensor, device: tensor.to(device, non_blocking=True))
    monkeypatch.setattr(plan, "may_wait_for", lambda tensor: True)
    monkeypatch.setattr(masks, "compute_dtype", lambda dtype, device: dtype)  # torch has no autocast for it
