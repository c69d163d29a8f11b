"""Measures the Triton kernels on the GPU that is here, beside torch's own on the same, in bfloat16:

    python -m tests.attention.measure_kernels

Of attention, the operations a second, on the blocks that are read, as a multiple of those of torch's flash attention,
which reads all. Of the normalised sum in training, torch's time as a multiple of that of the kernels:
`layer_norm.FEWEST_NUMBERS` should stand where it passes 1.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from bigbird_plus import Sparsity, block_sparse_attention, layer_norm, layer_norm_kernels

HEADS, BLOCK_SIZE, WIDTH = 12, 64, 768
SHAPES = [(8, 4096, 64), (2, 16384, 64), (1, 65536, 64), (8, 4096, 80), (8, 4096, 96), (8, 4096, 128)]
TOKENS = [2**exponent for exponent in range(10, 17)]


def seconds(call: Callable[[], object]) -> float:
    """Of a call, when others wait behind it."""
    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.5).median


def steps(forward: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Callable[[], object]]:
    """A forward pass alone, and with the gradients of all inputs. What comes out is shaped as the first of them."""
    leaves, grad = [tensor.detach().requires_grad_() for tensor in inputs], torch.randn_like(inputs[0])
    return {
        "forward": torch.no_grad()(partial(forward, *inputs)),
        "with backward": lambda: torch.autograd.grad(forward(*leaves), leaves, grad),
    }


def ratios(ours: Callable[..., Tensor], others: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, float]:
    """The other's time as a multiple of ours, of each step."""
    mine, theirs = steps(ours, inputs), steps(others, inputs)
    return {name: seconds(theirs[name]) / seconds(step) for name, step in mine.items()}


def rates_of_attention(batch: int, length: int, head_dim: int, **where) -> dict[str, float]:
    """Our rate as a multiple of flash attention's, of each step, with the random blocks of training."""
    inputs = [torch.randn(batch, length, HEADS, head_dim, **where).transpose(1, 2) for _ in range(3)]
    ours = partial(block_sparse_attention, block_size=BLOCK_SIZE, training=True, implementation="triton")
    pattern = Sparsity(HEADS, BLOCK_SIZE).pattern(length // BLOCK_SIZE, training=True)
    share = (pattern.counts > 0).mean()
    return {name: ratio * share for name, ratio in ratios(ours, flash, inputs).items()}


def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's flash attention, of everything."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def speed_of_norm(tokens: int, **where) -> dict[str, float]:
    """torch's time as a multiple of that of the kernels, of each step."""
    states = [torch.randn(tokens, WIDTH, **where) for _ in range(2)]
    parameters = [torch.randn(WIDTH, **where) for _ in range(3)]
    settings = (1e-5, where["dtype"])
    ours = lambda *inputs: layer_norm._NormOfSum.apply(*inputs, *settings, layer_norm_kernels)  # noqa: E731
    return ratios(ours, lambda *inputs: layer_norm.definition(*inputs, *settings), [*states, *parameters])


def main(device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> None:
    where = {"device": device, "dtype": dtype}
    print(torch.cuda.get_device_name() if device == "cuda" else device)
    for shape in SHAPES:
        print("attention, {} x {:,} tokens, heads of {}:".format(*shape), told(rates_of_attention(*shape, **where)))
    for tokens in TOKENS:
        print(f"norm of {tokens * WIDTH / 2**20:g} x 2^20 numbers:", told(speed_of_norm(tokens, **where)))


def told(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {figure:.2f}" for name, figure in figures.items())


if __name__ == "__main__":
    main()
