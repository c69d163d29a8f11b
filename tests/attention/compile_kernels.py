"""Compiles the Triton kernels as calls of all kinds launch them, for GPUs that need not be there.

    python -m tests.attention.compile_kernels 80 120

Prints of each how much shared memory it takes. To be run without Triton's interpreter.
"""

import sys
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bigbird_plus import Sparsity
from bigbird_plus.attention.global_tokens import find_global_tokens
from bigbird_plus.attention.impl import triton as engine
from bigbird_plus.attention.ops import Reading

KERNELS = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "merge_kernel")
POINTERS = {torch.bool: "*i1", torch.int32: "*i32", torch.float32: "*fp32", torch.bfloat16: "*bf16"}
SPARSITY = Sparsity(num_attention_heads=2, num_random_blocks=1)
BLOCKS = 12


def readings():
    """What calls read, by name."""
    pattern, length = SPARSITY.pattern(BLOCKS, training=True), BLOCKS * 64
    mask, chosen = torch.ones(1, length, dtype=torch.bool), torch.arange(length)[None] == 70
    documents = torch.tensor([[0, 0, BLOCKS]], dtype=torch.int32)
    tokens = find_global_tokens(chosen, 0, 1, length, chosen.device)
    return {
        "decoder": Reading(SPARSITY.causal_pattern(BLOCKS), 0.1),
        "packed": Reading(pattern, 0.1, mask, documents=documents),
        "global tokens": Reading(pattern, 0.1, mask, tokens),
    }


class Compiler:
    """In the place of a kernel."""

    def __init__(self, name: str, call: str, targets: list[GPUTarget]):
        self.name, self.call, self.targets = name, call, targets
        self.kernel = getattr(engine, name)

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_stages=3, **constants):
        given = dict(zip(self.kernel.arg_names, args, strict=False))
        constants |= {name: None for name, value in given.items() if value is None}
        kinds = {name: self.kind(given.get(name)) for name in self.kernel.arg_names}
        places = [place for place, kind in enumerate(kinds.values()) if kind.startswith("*")]
        aligned = {(place,): [["tt.divisibility", 16]] for place in places}
        source = ASTSource(self.kernel, kinds, constants, aligned)
        for target in self.targets:
            compiled = triton.compile(source, target=target, options={"num_stages": num_stages})
            print(f"{self.name} of {self.call}, {target.arch}: {compiled.metadata.shared} bytes shared", flush=True)

    @staticmethod
    def kind(value) -> str:
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        return {int: "i32", float: "fp32"}.get(type(value), "constexpr")


def main(*capabilities: str) -> None:
    targets = [GPUTarget("cuda", int(capability), 32) for capability in capabilities]
    tensors = {dtype: torch.zeros(1, BLOCKS * 64, 2, 64, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    for name, reading in readings().items():
        dtype = torch.float32 if name == "decoder" else torch.bfloat16
        states = tensors[dtype]
        call = f"{name} in {dtype}"
        compilers = {kernel: Compiler(kernel, call, targets) for kernel in KERNELS}
        with mock.patch.multiple(engine, **compilers, SHORTEST_SEGMENT=4):
            context, log_sum_exp = engine.attend(states, states, states, reading)
            engine.gradients(states, states, states, states, context, log_sum_exp, reading)


if __name__ == "__main__":
    main(*sys.argv[1:])
