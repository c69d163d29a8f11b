"""Single tokens that read everything and are read by all: those that a user chose, and those that stand for the whole
input without being part of it (the extra tokens of ETC, arXiv 2004.08483)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .common import is_tracing, to_device
from .pattern import BlockPattern


class GlobalTokens(NamedTuple):
    """The global tokens of a batch, besides those of a pattern's global blocks.

    A global token reads every token once. Any other token reads it as often as the pattern says, and once if the
    pattern says never.

    Attributes:
        places: `int64`, `[batch, tokens]`: where they stand in the input, each once, but for what fills up the rows of
            those documents that have fewer.
        is_token: `bool`, `[batch, tokens]`, False for what fills up; None where nothing does.
        num_extra: how many tokens at the end of the input, behind its last block, are such extra ones. They are in
            `places`, too.
    """

    places: Tensor
    is_token: Tensor | None
    num_extra: int

    def mask(self, length: int) -> Tensor:
        """`bool`, `[batch, length]`: whether a token is a global one."""
        is_token = torch.ones_like(self.places) if self.is_token is None else self.is_token.long()
        return self.places.new_zeros(self.places.shape[0], length).scatter_add(1, self.places, is_token) > 0

    def take(self, tensor: Tensor) -> Tensor:
        """`[batch, length, ...]` -> `[batch, tokens, ...]`."""
        return tensor[self._rows(), self.places]

    def add(self, tokens: Tensor, target: Tensor) -> None:
        """The transpose of `take`: adds `[batch, tokens, ...]` to where it comes from in `target`."""
        target.index_put_((self._rows(), self.places), tokens, accumulate=True)

    def put(self, tokens: Tensor, target: Tensor) -> None:
        """Writes `[batch, tokens, ...]` to the global places of `target`, `[batch, length, ...]`."""
        rows, places = self._rows().expand_as(self.places), self.places
        if self.is_token is not None:
            rows, places, tokens = rows[self.is_token], places[self.is_token], tokens[self.is_token]
        target.index_put_((rows, places), tokens)

    def of_documents(self, documents: slice) -> "GlobalTokens":
        """Those of some documents of the batch."""
        is_token = None if self.is_token is None else self.is_token[documents]
        return GlobalTokens(self.places[documents], is_token, self.num_extra)

    def with_blocks(self, blocks: tuple[int, ...], block_size: int) -> "GlobalTokens":
        """These and all tokens of some blocks."""
        batch, device = self.places.shape[0], self.places.device
        index = torch.tensor(blocks, device=device)
        more = (index[:, None] * block_size + torch.arange(block_size, device=device)).flatten().expand(batch, -1)
        is_new = (self.places[..., None] // block_size != index).all(-1)
        is_token = is_new if self.is_token is None else is_new & self.is_token
        is_token = torch.cat((is_token, torch.ones_like(more, dtype=torch.bool)), dim=1)
        return GlobalTokens(torch.cat((self.places, more), dim=1), is_token, self.num_extra)

    def _rows(self) -> Tensor:
        return torch.arange(self.places.shape[0], device=self.places.device)[:, None]


def with_middle_blocks(tokens: GlobalTokens | None, pattern: BlockPattern, batch: int, device) -> GlobalTokens | None:
    """The global tokens, those of the pattern's `middle_blocks` among them; None if there are none."""
    if not pattern.middle_blocks:
        return tokens
    if tokens is None:
        tokens = GlobalTokens(torch.empty(batch, 0, dtype=torch.int64, device=device), None, 0)
    return tokens.with_blocks(pattern.middle_blocks, pattern.block_size)


def find_global_tokens(
    global_mask: Tensor | None, num_extra: int, batch: int, length: int, device
) -> GlobalTokens | None:
    """The global tokens of an input, None if there are none.

    Args:
        global_mask: `bool`, `[batch, up to length]`: which tokens are global; None for none.
        num_extra: extra tokens behind the blocks of the input.
        length: tokens in the blocks of the input.

    Raises:
        ValueError: if a graph is being traced: how many tokens are global must be known.
    """
    if global_mask is not None and is_tracing():
        raise ValueError(
            "global_attention_mask cannot be used under torch.compile, torch.export or torch.jit.trace, where the "
            "number of tokens that it chooses is not known. Leave it out, or run the model as it is."
        )
    if global_mask is not None:
        global_mask = global_mask.cpu()  # how many there are decides on shapes
    most = 0 if global_mask is None else int(global_mask.sum(-1).max())
    if global_mask is None or not most:
        extra = torch.arange(length, length + num_extra, device=device).expand(batch, -1)
        return GlobalTokens(extra, None, num_extra) if num_extra else None
    extra = torch.arange(length, length + num_extra).expand(batch, -1)
    places = global_mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :most]
    is_token = torch.cat((global_mask.gather(1, places), torch.ones_like(extra, dtype=torch.bool)), dim=1)
    return GlobalTokens(to_device(torch.cat((places, extra), dim=1), device), to_device(is_token, device), num_extra)
