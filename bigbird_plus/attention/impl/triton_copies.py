"""Single global tokens for kernels that walk over lists of blocks.

Behind the blocks of the input stand further ones, which read everything and are read by all. They hold the extra
tokens, and copies of those that were chosen. A copy asks in its token's stead. As a key it is for those blocks alone
that do not read the block in which the token stands.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import count_blocks
from ..ops import Reading
from .triton_lists import WalkLists


class Copies(NamedTuple):
    """What fills the further blocks: extra tokens, copies, and nothing.

    chosen: `int64`, `[batch, copies]`: whose copies they are. No token has two.
    is_chosen: `bool`, `[batch, copies]`, False for copies of tokens that were not chosen, which nobody reads.
    length: tokens in the blocks of the input, and extra ones.
    num_extra: those.
    block_size: tokens in a block.
    """

    chosen: Tensor
    is_chosen: Tensor
    length: int
    num_extra: int
    block_size: int

    @classmethod
    def of(cls, reading: Reading, length: int) -> "Copies | None":
        """Those of a reading of so many tokens, extra ones included; None without global tokens."""
        tokens = reading.global_tokens
        if tokens is None:
            return None
        count = tokens.places.shape[1] - tokens.num_extra
        chosen, is_chosen = tokens.places[:, :count], tokens.is_token
        is_chosen = torch.ones_like(chosen, dtype=torch.bool) if is_chosen is None else is_chosen[:, :count]
        return cls(chosen, is_chosen, length, tokens.num_extra, reading.pattern.block_size)

    @property
    def num_blocks(self) -> int:
        """The further blocks."""
        return count_blocks(self.num_extra + self.chosen.shape[1], self.block_size)

    def add_to(self, tensor: Tensor, copied: Tensor | None = None) -> Tensor:
        """`[batch, length, ...]` and the further blocks of the same: copies, or `copied`, and zeros."""
        copied = tensor[self._index] if copied is None else copied
        missing = self.num_blocks * self.block_size - self.num_extra - copied.shape[1]
        nothing = tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])
        return torch.cat((tensor, copied, nothing), dim=1)

    def move_from(self, tensor: Tensor) -> Tensor:
        """The same, but what was copied is there no more, nor are copies of what was not chosen."""
        copied = self._of_chosen(tensor[self._index])
        moved = self.add_to(tensor, copied)
        moved[self._index] = tensor[self._index] - copied
        return moved

    def put_back(self, extended: Tensor) -> Tensor:
        """Of `[batch, length and further blocks, ...]` the tokens of the input, `[batch, length, ...]`: the copies of
        chosen ones instead of themselves."""
        tensor = extended[:, : self.length].contiguous()
        is_chosen = self.is_chosen[(..., *[None] * (tensor.dim() - 2))]
        tensor[self._index] = torch.where(is_chosen, self._copies(extended), tensor[self._index])
        return tensor

    def add_back(self, extended: Tensor) -> Tensor:
        """The transpose of `add_to`."""
        tensor = extended[:, : self.length].contiguous()
        tensor[self._index] += self._copies(extended)
        return tensor

    def key_mask(self, key_mask: Tensor | None) -> Tensor:
        """`bool`, `[batch, length and further blocks]`: what is real there."""
        if key_mask is None:
            key_mask = torch.ones(len(self.chosen), self.length, dtype=torch.bool, device=self.chosen.device)
        return self.add_to(key_mask, self.is_chosen)

    def read_by(self, reads: WalkLists) -> Tensor | None:
        """`bool`, `[batch, heads or 1, blocks, tokens of the further blocks]`: whether each block reads those; None if
        the key mask says all, since there are no copies."""
        (batch, count), (layouts, num_blocks) = self.chosen.shape, (len(reads.starts), reads.num_blocks)
        if not count:
            return None
        readers = torch.arange(layouts * num_blocks, device=self.chosen.device)
        sizes = reads.starts.diff().flatten()
        pairs = readers.repeat_interleave(sizes, output_size=len(reads.blocks)) * num_blocks + reads.blocks
        asked = readers[:, None] * num_blocks + (self.chosen // self.block_size)[:, None]
        found = pairs[torch.searchsorted(pairs, asked).clamp(max=len(pairs) - 1)] == asked
        unread = ~found & self.is_chosen[:, None]
        missing = self.num_blocks * self.block_size - self.num_extra - count
        table = (
            unread.new_ones(batch, len(readers), self.num_extra),
            unread,
            unread.new_zeros(batch, len(readers), missing),
        )
        return torch.cat(table, dim=2).view(batch, layouts, num_blocks, -1)

    @property
    def _index(self) -> tuple[Tensor, Tensor]:
        return torch.arange(len(self.chosen), device=self.chosen.device)[:, None], self.chosen

    def _copies(self, extended: Tensor) -> Tensor:
        return extended[:, self.length : self.length + self.chosen.shape[1]]

    def _of_chosen(self, copies: Tensor) -> Tensor:
        return copies * self.is_chosen[(..., *[None] * (copies.dim() - 2))]
