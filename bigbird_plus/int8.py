"""Linear layers with weights of 8 bits, for CPUs: oneDNN's product of integers, of states that are quantized as they
come, each token by itself. So what a token gets does not depend on the others of its batch, nor on how many are taken
at once."""

from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention.common import chunks, is_tracing, is_transformed, per_chunk


class Packed(NamedTuple):
    """A weight in oneDNN's order, the sum of each row, and the greatest number that states may be."""

    weight: Tensor
    sums: Tensor
    most_of_states: int


class Operands(NamedTuple):
    """Of a layer: its packed weight, the scale of each output, the sums of the weight's rows in this scale, the bias,
    and the greatest number that states may be."""

    weight: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor
    most_of_states: int


class Int8Linear(nn.Module):
    """In the place of an `nn.Linear`, for inference: `states weight^T + bias`, with a scale for each output.

    Weights and states have 8 bits. Processors without VNNI instructions add the products of two neighbouring columns
    in 16 bits, which 8 by 8 bits may overflow. So scales are such that no two neighbours of one sign come to more than
    128, and products are exact everywhere. Weights in files from before that meet states of 7 bits there.

    The state dict holds `weight`, int8 `[out_features, in_features]`, `scale`, `[out_features]`, and `bias`,
    `[out_features]`. While the layer is on a CPU it keeps the weight in oneDNN's order alone.
    """

    weight: Any  # None while it is packed
    scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        """Without numbers: see `of`, or load some."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)
        self._packed: Packed | None = None

    @classmethod
    def like(cls, layer: nn.Linear) -> "Int8Linear":
        """Of its sizes, on its device, without numbers."""
        with layer.weight.device:
            return cls(layer.in_features, layer.out_features, layer.bias is not None).train(layer.training)

    @classmethod
    def of(cls, layer: nn.Linear) -> "Int8Linear":
        """With the weight of a linear layer, rounded."""
        quantized = cls.like(layer)
        quantized.weight, quantized.scale = _rounded(layer.weight.detach())
        quantized.bias = None if layer.bias is None else layer.bias.detach()
        quantized.pack()
        return quantized

    def pack(self) -> None:
        """Put the weight into oneDNN's order, which forward passes would otherwise do each time. On a CPU only."""
        if self._packed is None and self.weight.device.type == "cpu" and has_int8():
            self._packed = _pack(self.weight)
            self.weight = None

    def unpack(self) -> None:
        """The reverse."""
        self.weight, self._packed = self._plain_weight(), None

    def _plain_weight(self) -> Tensor:
        return self.weight if self._packed is None else self._packed.weight.to_dense().t().contiguous()

    def forward(self, states: Tensor) -> Tensor:
        """Of `[..., in_features]` and a floating dtype, to `[..., out_features]` of the same.

        Raises:
            RuntimeError: where states need gradients, which rounding has not, or a graph is made for elsewhere.
            ValueError: on another device, or where torch lacks the operators.
        """
        return products((self,), states)[0]

    def operands(self) -> Operands:
        """What `products` takes."""
        packed = _pack(self.weight) if self._packed is None else self._packed
        scale = self.scale.float()
        bias = torch.zeros_like(scale) if self.bias is None else self.bias.float()
        return Operands(packed.weight, scale, packed.sums * scale, bias, packed.most_of_states)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    # What torch does with a module's tensors, it does with the plain weight: oneDNN's order is the processor's own.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._plain_weight()

    @contextmanager
    def _unpacked(self):
        was_packed = self._packed is not None
        self.unpack()
        yield
        if was_packed:
            self.pack()

    def _load_from_state_dict(self, *arguments, **named):
        with self._unpacked():
            super()._load_from_state_dict(*arguments, **named)

    def _apply(self, *arguments, **named):
        with self._unpacked():
            return super()._apply(*arguments, **named)

    def __getstate__(self):
        return {**self.__dict__, "_packed": None, "_buffers": {**self._buffers, "weight": self._plain_weight()}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.pack()


@torch.compiler.disable
def products(layers: Sequence[Int8Linear], states: Tensor) -> list[Tensor]:
    """`[layer(states) for layer in layers]`, of layers with the same `in_features`: states are quantized once.

    Raises:
        RuntimeError, ValueError: as `Int8Linear.forward`.
    """
    if torch.is_grad_enabled() and states.requires_grad:
        raise RuntimeError(
            "A model quantized to int8 gives no gradients to the states of its layers. Use torch.no_grad(), or "
            "train before you quantize."
        )
    if is_tracing() or is_transformed():
        raise RuntimeError("An int8 model cannot be exported or transformed. Take the model that it was made of.")
    require_int8(states.device)
    inputs, outputs = layers[0].in_features, [layer.out_features for layer in layers]
    rows = states.reshape(-1, inputs)
    operands = [layer.operands() for layer in layers]
    most = min(layer.most_of_states for layer in operands)
    results = [torch.empty(len(rows), width) for width in outputs]
    for piece in chunks(0, len(rows), per_chunk(_COPIES * (inputs + max(outputs)))):
        where = slice(piece.start, piece.stop)
        levels, step, lowest = _quantized(rows[where].float(), most)
        for layer, result in zip(operands, results, strict=True):
            product = _product(levels, layer.weight, layer.scale)
            torch.addcmul(layer.bias, lowest, layer.sums, out=result[where]).addcmul_(product, step)
    shape = states.shape[:-1]
    return [result.to(states.dtype).view(*shape, result.shape[1]) for result in results]


_COPIES = 4 * torch.float32.itemsize


def require_int8(device: torch.device) -> None:
    """Raises a ValueError where products of 8 bits cannot be computed."""
    if device.type != "cpu":
        raise ValueError(f"int8 models compute on a CPU, not on {device}: move model and inputs there.")
    if not has_int8():
        raise ValueError("int8 models need torch with oneDNN's operators for integers, which this one has not.")


def has_int8() -> bool:
    """Whether products of 8 bits can be computed."""
    return most_of_states(any_weight=False) > 0


@cache
def most_of_states(any_weight: bool) -> int:
    """The greatest number that states may be for products to be exact: 255, 127, or 0 for none.

    Told by the products that are hardest to keep, of weights of 127 alone, or of those whose neighbours fit.
    """
    rows = [[127] * 4] if any_weight else [[127, 1, 127, 1], [127, 1, 1, 127], [1, 127, 127, 1]]
    weight = torch.tensor([*rows, *(-torch.tensor(rows)).tolist()], dtype=torch.int8).repeat(8, 16)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        for most in (255, 127):
            states = torch.full((32, weight.shape[1]), most, dtype=torch.uint8)
            exact = most * weight.sum(1)
            if (_product(states, packed, torch.ones(len(weight))) == exact).all():
                return most
    except (AttributeError, RuntimeError, TypeError):
        pass
    return 0


def rounding_error(layer: nn.Linear) -> float:
    """What its weight loses in int8, relative in norm: 0.01 where its numbers are spread as those of a normal
    distribution, more where a row has outliers, which widen its scale, and 0 where all are zero."""
    weight = layer.weight.detach()
    rounded, scale = _rounded(weight)
    weight = weight.float()
    return ((rounded * scale[:, None].float() - weight).norm() / weight.norm().clamp(min=1e-30)).item()


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in int8, and the scale of each row."""
    scale = (_of_neighbours(weight) / 127).clamp_(min=torch.finfo(weight.dtype).tiny)  # rounding may add one
    return (weight.float() / scale[:, None].float()).round_().to(torch.int8), scale


def _of_neighbours(weight: Tensor) -> Tensor:
    """The most that two neighbours of one sign come to, the columns `2 j` and `2 j + 1`, in each row."""
    pairs = nn.functional.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
    return torch.maximum(pairs.clamp(min=0).sum(2), -pairs.clamp(max=0).sum(2)).amax(1)


def _pack(weight: Tensor) -> Packed:
    """Of an int8 weight."""
    fits = bool((_of_neighbours(weight) <= 128).all())
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    return Packed(packed, weight.sum(1, dtype=torch.float32), most_of_states(any_weight=not fits))


def _quantized(rows: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """`levels`, uint8 up to `most`, `step` and `lowest`, `[rows, 1]`, with `rows ~ lowest + step levels`. Their range
    has zero."""
    lowest = rows.amin(1, keepdim=True).clamp_(max=0)
    step = (rows.amax(1, keepdim=True).clamp_(min=0) - lowest).div_(most).clamp_(min=torch.finfo(rows.dtype).tiny)
    inverse = step.reciprocal()
    # Whole numbers by cutting. Straight to uint8 takes twice as long, and addcmul of two columns as mul and add.
    levels = torch.mul(rows, inverse).add_(0.5 - lowest * inverse).to(torch.int16).to(torch.uint8)
    return levels, step, lowest


def _product(states: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """oneDNN's `scale (states weight^T)`, float32, of uint8 and a packed int8."""
    zero = torch.zeros_like(scale, dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        states, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
