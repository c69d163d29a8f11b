"""The engines of block-sparse attention, and which of them runs a call.

An engine is a module, or whatever else, with two functions:

* `reason(call)`, of a `Call`: why it cannot run that, in words; None if it can.
* `forward(query, key, value, pattern, key_mask, global_tokens, *, scaling)`: the context, see `reference.forward`,
  which is the definition.
"""

from contextlib import suppress
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .common import is_transformed
from .impl import flash_cpu, flex, gather, reference


class Call(NamedTuple):
    """What an engine is asked to do.

    device, dtype, head_dim: those of the queries.
    block_size: tokens in a block.
    is_causal: whether it is a decoder's call.
    has_global_tokens: whether there are single global tokens.
    needs_gradients: whether gradients will be asked for.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int
    is_causal: bool = False
    has_global_tokens: bool = False
    needs_gradients: bool = False


class Engine(Protocol):
    """See above."""

    def reason(self, call: Call) -> str | None: ...

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pattern, key_mask, global_tokens, *, scaling): ...


class Choice(NamedTuple):
    """The engine that runs a call.

    name: its name.
    engine: itself.
    passed_over: those that were asked before it, with their reasons.
    """

    name: str
    engine: Engine
    passed_over: dict[str, str]


AUTOMATIC = ("triton", "merged", "gather")
"""In the order in which they are asked. (A name with "flash" in it transformers takes for one of a kernel to load.)"""

NO_TRITON = "the kernels are for NVIDIA's GPUs, and this torch is built without CUDA, or Triton is missing"

_engines: dict[str, Engine] = {"eager": reference, "flex_attention": flex, "merged": flash_cpu, "gather": gather}
if torch.version.cuda is not None:  # torch for other devices need not have Triton
    with suppress(ImportError):
        from .impl import triton

        _engines["triton"] = triton


def register_engine(name: str, engine: Engine) -> None:
    """Makes an engine of your own available as `attn_implementation=name`; what is read in full under that name is
    computed by torch's `scaled_dot_product_attention`.

    Args:
        name: one that nothing else has.
        engine: an object or a module with two functions. `reason(call)`, of an `engines.Call`, says why the engine
            cannot run that, in words, or gives None. `forward(query, key, value, pattern, key_mask, global_tokens, *,
            scaling)` gives the context; see `attention/impl/reference.py`, which is the definition.

    Raises:
        ValueError: if the name is taken, or a function is missing.
    """
    if name in _engines or name in ALL_ATTENTION_FUNCTIONS or name == "eager":
        raise ValueError(f"name must be new, but there is an attention implementation {name!r} already.")
    if not callable(getattr(engine, "reason", None)) or not callable(getattr(engine, "forward", None)):
        raise ValueError(f"engine must have the functions reason and forward, but {engine!r} has not.")
    _engines[name] = engine
    name_to_transformers(name)


def name_to_transformers(name: str) -> None:
    """Lets transformers accept the name of an engine as `attn_implementation`."""
    AttentionInterface.register(name, ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def engine_names() -> list[str]:
    """The names that block-sparse attention has here."""
    return ["sdpa", *_engines]


def is_engine(name: str) -> bool:
    """Whether this is the name of an engine that knows block-sparse attention alone."""
    return name in AUTOMATIC or (name in _engines and name not in ("eager", "flex_attention"))


def choose_engine(implementation: str, call: Call) -> Choice:
    """The engine that runs a call under a name: for `"eager"` and `"flex_attention"` those of that name, but where
    FlexAttention cannot, as for single global tokens; the engine itself for its own name; else the first of
    `AUTOMATIC` that can.

    Raises:
        ValueError: if an engine that was named cannot run the call.
    """
    if implementation == "eager" or is_transformed():
        return Choice("eager", reference, {})
    if is_engine(implementation):
        reason = _reason(implementation, call)
        if reason is not None:
            raise ValueError(
                f"attn_implementation={implementation!r} cannot run this: {reason}. Choose 'sdpa', which takes an "
                "engine that can."
            )
        return Choice(implementation, _engines[implementation], {})
    passed_over: dict[str, str] = {}
    for name in ("flex_attention", *AUTOMATIC) if implementation == "flex_attention" else AUTOMATIC:
        reason = _reason(name, call)
        if reason is None:
            return Choice(name, _engines[name], passed_over)
        passed_over[name] = reason
    raise AssertionError("gathering runs everything")


def _reason(name: str, call: Call) -> str | None:
    return _engines[name].reason(call) if name in _engines else NO_TRITON
