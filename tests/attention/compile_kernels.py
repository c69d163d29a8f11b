"""Compiles the Triton kernels as calls of all kinds launch them, for GPUs that need not be there.

    python -m tests.attention.compile_kernels 80 90         # some calls
    python -m tests.attention.compile_kernels --all 80 90   # all

Prints of each kernel what it takes: registers and stack of a thread (the stack holds what registers do not), and
shared memory. Fails if that is more than GPUs have. To be run without Triton's interpreter.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends import compiler as backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bigbird_plus import Sparsity, layer_norm_kernels
from bigbird_plus.attention.global_tokens import find_global_tokens
from bigbird_plus.attention.impl import triton as engine
from bigbird_plus.attention.ops import Reading

MOST_SHARED = 99 * 1024
"""Bytes that a program has on GPUs of the capabilities 8.6, 8.9 and 12.0. All others have more."""

MOST_STACK = 160
"""Bytes a thread. What the gradients of keys take with Triton 3.9, heads of 96 to 128:

| warps   | 8.0 | 9.0 | 12.0 |
|---|---|---|---|
| float32, 4 (no more), decoder    | 392 | 440 | 368 |
| float32, 8                       | 40 to 136 | 104 to 120 | 40 to 144 |
| bfloat16, 4                      | 16 to 104 | 0 to 16 | 40 to 120 |
| bfloat16, 8 (not used)           | 0 | 0 | 0 |

They hold up to 255 registers, and take 98,580 bytes of shared memory in float32. Tiles of 16 tokens would take no
stack and half of the shared memory, but half as many products again. Heads of 64 take no stack."""

IS_OLD = hasattr(backends, "AttrsDescriptor")
"""Whether this is Triton 3.2, which spills more."""

KERNELS = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "merge_kernel")
POINTERS = {torch.bool: "*i1", torch.int32: "*i32", torch.float32: "*fp32", torch.bfloat16: "*bf16"}
SPARSITY = Sparsity(num_attention_heads=2, num_random_blocks=1)
BLOCKS = 12
HALF, SINGLE = torch.bfloat16, torch.float32
CALLS = [("decoder", SINGLE, 64), ("packed", HALF, 64), ("global tokens", SINGLE, 128)]
ALL_CALLS = [
    *((name, dtype, 64) for name in ("decoder", "packed", "global tokens") for dtype in (HALF, SINGLE)),
    *(("global tokens", dtype, head_dim) for head_dim in (80, 96, 128) for dtype in (HALF, SINGLE)),
]


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
    """In the place of a kernel of a module."""

    def __init__(self, module, name: str, call: str, capabilities: list[int]):
        self.name, self.call, self.capabilities = name, call, capabilities
        self.kernel = getattr(module, name)

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, num_stages=3, **constants):
        options = {"num_warps": num_warps, "num_stages": num_stages}
        source = make_source(self.kernel, args, constants)
        for capability in self.capabilities:
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            registers, stack = resources(compiled.asm["cubin"])
            shared = compiled.metadata.shared
            taken = f"{registers} registers, {stack} bytes of stack, {shared} bytes shared"
            print(f"{self.name} of {self.call}, {capability}: {taken}", flush=True)
            assert shared <= MOST_SHARED and (IS_OLD or stack <= MOST_STACK), taken


def make_source(kernel, args, constants) -> ASTSource:
    """What is to be compiled for a call."""
    given = dict(zip(kernel.arg_names, args, strict=False))
    constants = constants | {name: None for name, value in given.items() if value is None}
    kinds = {name: kind_of(given.get(name)) for name in kernel.arg_names}
    places = [place for place, kind in enumerate(kinds.values()) if kind.startswith("*")]
    if IS_OLD:
        aligned = backends.AttrsDescriptor.from_hints(dict.fromkeys(places, 16))
        kinds = {name: kind for name, kind in kinds.items() if kind != "constexpr"}
    else:
        aligned = {(place,): [["tt.divisibility", 16]] for place in places}
    return ASTSource(kernel, kinds, constants, aligned)


def kind_of(value) -> str:
    """What a kernel is compiled for."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return {int: "i32", float: "fp32"}.get(type(value), "constexpr")


def resources(binary: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told).groups()
    return int(registers), int(stack)


def compile_attention(name: str, dtype: torch.dtype, head_dim: int, capabilities: list[int]) -> None:
    """The kernels of a call and of its gradients."""
    reading, states = readings()[name], torch.zeros(1, BLOCKS * 64, 2, head_dim, dtype=dtype)
    call = f"{name} in {dtype}, heads of {head_dim}"
    compilers = {kernel: Compiler(engine, kernel, call, capabilities) for kernel in KERNELS}
    with mock.patch.multiple(engine, **compilers, SHORTEST_SEGMENT=4):
        context, log_sum_exp = engine.attend(states, states, states, reading)
        engine.gradients(states, states, states, states, context, log_sum_exp, reading)


def compile_layer_norm(dtype: torch.dtype, width: int, capabilities: list[int]) -> None:
    """The kernels of a normalised sum, and of its gradients."""
    states, parameters = torch.zeros(16, width, dtype=dtype), torch.zeros(3, width, dtype=dtype)
    names = ("forward_kernel", "backward_kernel")
    call = f"a norm of {width} in {dtype}"
    compilers = {name: Compiler(layer_norm_kernels, name, call, capabilities) for name in names}
    with mock.patch.multiple(layer_norm_kernels, **compilers):
        _, *statistics = layer_norm_kernels.forward(states, states, *parameters, 1e-5, dtype)
        layer_norm_kernels.gradients(states, states, states, *parameters[:2], *statistics)


def main(*arguments: str) -> None:
    capabilities = [int(argument) for argument in arguments if argument != "--all"]
    wants_all = "--all" in arguments
    for call in ALL_CALLS if wants_all else CALLS:
        compile_attention(*call, capabilities)
    for width in (768, 4096) if wants_all else (768,):
        compile_layer_norm(HALF, width, capabilities)


if __name__ == "__main__":
    main(*sys.argv[1:])
