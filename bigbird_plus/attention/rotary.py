"""Rotary positions (RoFormer, arXiv 2104.09864): queries and keys are turned by angles that grow with the position, so
that scores depend on distances alone. There is no longest input."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of the angles, `float32`, `[1 or batch, length, rotary_dim / 2]`."""

    cos: Tensor
    sin: Tensor

    def turn(self, states: Tensor) -> Tensor:
        """`[batch, length, heads, head_dim]` of the same. The first `rotary_dim` numbers of a head are turned: the
        number i of their first half together with the number i of their second."""
        cos, sin = (tensor[:, :, None].to(states.dtype) for tensor in self)
        first, second, rest = states.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def of(self, *places: slice) -> "Rotation":
        """That of some places, one run of them after another."""
        return Rotation(*(torch.cat([tensor[:, run] for run in places], dim=1) for tensor in self))

    def of_documents(self, documents: slice) -> "Rotation":
        """That of a part of the batch."""
        return Rotation(*(tensor if len(tensor) == 1 else tensor[documents] for tensor in self))


def make_rotation(config, positions: Tensor) -> Rotation | None:
    """The rotation at `positions`, `[1 or batch, length]`; None for models with positions of another kind."""
    if config.position_embedding_type != "rotary":
        return None
    dim = config.rotary_dim or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions[..., None].float() / config.rope_theta**exponents
    return Rotation(angles.cos(), angles.sin())
