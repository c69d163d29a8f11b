"""Which block reads which: the one definition of BigBird's sparse pattern (arXiv 2007.14062, section 2)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .caches import cached_up_to
from .common import count_blocks, is_exporting
from .random_blocks import (
    NO_BLOCK,
    CausalPlan,
    draw_random_blocks,
    draw_uniform_blocks,
    read_random_blocks,
    repeat_random_blocks,
)

KINDS_OF_READING = {
    "none": "#f4f4f4",
    "random": "#009e73",
    "window": "#0072b2",
    "global": "#e69f00",
    "first block, repeated": "#d55e00",
}
"""Why a block reads another, with the colour of `BlockPattern.plot`. The later a kind stands, the more it prevails."""


def check_whole_number(name: str, value, least: int) -> None:
    """Raises a `ValueError` that names the field unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but is {value!r}.")


@dataclass(frozen=True)
class Sparsity:
    """The settings of a sparse pattern; together with a length, a layer and the mode they make a `BlockPattern`.

    The fields have the names and meanings of `BigBirdConfig`'s. A value that makes no pattern raises a `ValueError`
    that names the field.
    """

    num_attention_heads: int
    block_size: int = 64
    num_random_blocks: int = 3
    num_sliding_window_blocks: int = 3
    num_global_blocks: int = 2
    eval_random_blocks: bool = False
    max_position_embeddings: int = 4096
    random_plan_positions: int | None = None
    different_layout_per_head: bool = True
    global_block_indices: Sequence[int] | None = None
    random_blocks: str | None = None

    def __post_init__(self):
        for name in ("num_attention_heads", "block_size", "num_sliding_window_blocks"):
            check_whole_number(name, getattr(self, name), 1)
        for name in ("num_random_blocks", "num_global_blocks"):
            check_whole_number(name, getattr(self, name), 0)
        if self.different_layout_per_head not in (True, False):
            raise ValueError(
                f"different_layout_per_head must be True or False, but is {self.different_layout_per_head!r}."
            )
        if self.num_sliding_window_blocks % 2 == 0:
            raise ValueError(
                "num_sliding_window_blocks must be odd (as many blocks before a block as behind it), "
                f"but is {self.num_sliding_window_blocks}."
            )
        if self.global_block_indices is not None:
            self._check_indices()
        if self.random_blocks is not None and not torch.compiler.is_compiling():
            self.own_plan()

    def _check_indices(self):
        indices = self.global_block_indices
        if not isinstance(indices, (tuple, list)) or any(
            isinstance(index, bool) or not isinstance(index, Integral) for index in indices
        ):
            raise ValueError(f"global_block_indices must be a list of whole numbers or None, but is {indices!r}.")
        if self.num_global_blocks != type(self).num_global_blocks:
            raise ValueError(
                f"global_block_indices ({list(indices)}) and num_global_blocks ({self.num_global_blocks}) both say "
                f"which blocks are global: leave num_global_blocks at its default, {type(self).num_global_blocks}."
            )
        object.__setattr__(self, "global_block_indices", tuple(int(index) for index in indices))  # can be hashed

    @classmethod
    def from_config(cls, config) -> "Sparsity":
        """The settings that a `BigBirdConfig` names."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    @property
    def full_attention_length(self) -> int:
        """The longest input, in tokens, that is read in full: blocks of all kinds and as many random ones again. With
        `random_blocks` the pattern holds at all lengths, and this is what it reads in full in any case."""
        if self.random_blocks is not None:
            num_global = self.num_global_blocks if self.global_block_indices is None else 0
            return max(1 + self.num_sliding_window_blocks // 2, num_global) * self.block_size
        num_global = self.num_global_blocks
        if self.global_block_indices is not None:
            num_global = len(set(self.global_block_indices))
        return (num_global + self.num_sliding_window_blocks + 2 * self.num_random_blocks) * self.block_size

    @property
    def is_original_shape(self) -> bool:
        """Whether this is the shape of the published models: a window of three blocks, a global one at either end."""
        if self.global_block_indices is not None:
            has_ends = set(self.global_block_indices) == {0, -1}
        else:
            has_ends = self.num_global_blocks == 2
        return self.num_sliding_window_blocks == 3 and has_ends

    @property
    def num_layouts(self) -> int:
        """How many draws of random blocks a layer has: one for each head, or one for all."""
        return self.num_attention_heads if self.different_layout_per_head else 1

    def own_plan(self) -> np.ndarray:
        """What `random_blocks` says, see `read_random_blocks`."""
        if not isinstance(self.random_blocks, str):
            raise ValueError(f"random_blocks must be a string or None, but is {self.random_blocks!r}.")
        return read_random_blocks(self.random_blocks, self.num_layouts, self.num_random_blocks)

    def pattern(self, num_blocks: int, *, layer_idx: int = 0, training: bool = False) -> "BlockPattern":
        """The pattern of one layer for an input of `num_blocks` blocks. Made once, then taken from a bounded cache."""
        reads_first_block = self.is_original_shape and not (training or self.eval_random_blocks)
        random = self.num_random_blocks > 0 and (self.random_blocks is not None or not reads_first_block)
        if self.random_blocks is not None:
            layer_idx = 0  # all layers read the same
        if not torch.compiler.is_compiling():
            return _make_pattern(self, num_blocks, layer_idx if random else None)
        origin = Origin(*self._for_operators(), num_blocks, layer_idx if random else None, False)
        if not random:
            extra = self.num_random_blocks if self.is_original_shape else 0
            return replace(self.structure(num_blocks), first_block_extra=extra, origin=origin)
        if is_exporting():
            plan = _plans_of_all_lengths(*self._for_operators(), layer_idx)[num_blocks].long()
            random_blocks = plan.index_select(1, torch.arange(num_blocks))
        else:
            random_blocks = torch.ops.bigbird_plus.random_blocks(*self._for_operators(), num_blocks, layer_idx, False)
        return replace(self.structure(num_blocks), random_blocks=random_blocks, origin=origin)

    def structure(self, num_blocks: int) -> "BlockPattern":
        """The pattern's global blocks and its window, without anything in the place of random blocks."""
        shape: dict[str, Any]
        shape = {"num_blocks": num_blocks, "block_size": self.block_size, "window": self.num_sliding_window_blocks}
        if self.global_block_indices is None:
            num_leading = (self.num_global_blocks + 1) // 2
            return BlockPattern(**shape, num_leading=num_leading, num_trailing=self.num_global_blocks - num_leading)
        chosen = _blocks_at(self.global_block_indices, num_blocks)
        num_leading = num_trailing = 0
        while num_leading in chosen:
            num_leading += 1
        while num_leading + num_trailing < len(chosen) and num_blocks - 1 - num_trailing in chosen:
            num_trailing += 1
        middle = tuple(block for block in chosen if num_leading <= block < num_blocks - num_trailing)
        return BlockPattern(**shape, num_leading=num_leading, num_trailing=num_trailing, middle_blocks=middle)

    def causal_pattern(self, num_blocks: int, *, layer_idx: int = 0) -> "BlockPattern":
        """The pattern of one layer of a decoder for `num_blocks` blocks: the beginning of that of any longer input."""
        if not torch.compiler.is_compiling():
            return _make_causal_pattern(self, num_blocks, layer_idx if self.num_random_blocks else None)
        random_blocks, has_random_blocks = None, self.num_random_blocks > 0
        if has_random_blocks and is_exporting():
            plan = _longest_causal_plan(*self._for_operators(), layer_idx)
            random_blocks = plan.index_select(1, torch.arange(num_blocks))
        elif has_random_blocks:
            random_blocks = torch.ops.bigbird_plus.random_blocks(*self._for_operators(), num_blocks, layer_idx, True)
        origin = Origin(*self._for_operators(), num_blocks, layer_idx if has_random_blocks else None, True)
        return replace(self._causal_structure(num_blocks), random_blocks=random_blocks, origin=origin)

    def _causal_structure(self, num_blocks: int) -> "BlockPattern":
        """The pattern of a decoder without its random blocks."""
        return BlockPattern(
            num_blocks=num_blocks,
            block_size=self.block_size,
            window=self.num_sliding_window_blocks,
            num_leading=(self.num_global_blocks + 1) // 2,
            num_full=self.full_attention_length // self.block_size,
            is_causal=True,
        )

    def _for_operators(self) -> tuple[list[int], list[int] | None, str | None]:
        """The settings as operators take them: numbers, 0 for None, and what is no number apart."""
        *numbers, indices, blocks = (getattr(self, name) for name in self.__dataclass_fields__)
        return [int(number or 0) for number in numbers], None if indices is None else list(indices), blocks

    @classmethod
    def _of_operators(cls, settings: list[int], indices: list[int] | None, blocks: str | None) -> "Sparsity":
        """The reverse."""
        fields: dict[str, Any] = dict(zip(cls.__dataclass_fields__, [*settings, indices, blocks], strict=True))
        return cls(**fields)


class Origin(NamedTuple):
    """What a pattern is made of, in the form in which operators take it.

    settings, indices, blocks: the fields of the `Sparsity`.
    num_blocks, layer_idx, is_causal: of the pattern; `layer_idx` is None for one without random blocks.
    heads: those whose random blocks it has; None for all.
    """

    settings: list[int]
    indices: list[int] | None
    blocks: str | None
    num_blocks: int
    layer_idx: int | None
    is_causal: bool
    heads: list[int] | None = None

    def pattern(self) -> "BlockPattern":
        """The pattern, outside of graphs."""
        make = _make_causal_pattern if self.is_causal else _make_pattern
        pattern = make(Sparsity._of_operators(*self[:3]), self.num_blocks, self.layer_idx)
        return pattern if self.heads is None else pattern.for_heads(self.heads)


def _blocks_at(indices: Sequence[int], num_blocks: int) -> list[int]:
    """The blocks that the indices name, each once. Negative ones count from the end; any out of range is ignored."""
    blocks = []
    for index in indices:
        block = index + num_blocks if index < 0 else index
        if 0 <= block < num_blocks and block not in blocks:
            blocks.append(block)
    return blocks


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockPattern:
    """How many times each block of an input reads each other block. A key that is read c times stands c times in the
    softmax: its scores get `+ log(c)`.

    In an encoder, a global block reads every block once. Any other block reads, once each, the global blocks and the
    blocks of its window, then its random blocks (once more where they are among those already read), and block 0
    `first_block_extra` more times.

    In a decoder (`is_causal`), blocks are counted from the first real token. The first `num_full` blocks read
    everything up to themselves. Any later one reads the leading blocks, the window that ends with itself, and its
    random blocks, none of them twice. In its own block, a token reads what stands before it, and itself.

    Attributes:
        num_blocks: blocks of the input.
        block_size: tokens in a block.
        window: blocks of a whole window.
        num_leading, num_trailing: global blocks at the beginning and at the end of the input.
        middle_blocks: further global blocks, between those.
        first_block_extra: additional readings of block 0, see `BigBirdConfig.eval_random_blocks`.
        num_full: of a decoder, blocks at its beginning that read everything up to themselves.
        origin: what it is made of, while a graph is traced.
        random_blocks: `int64` array `[heads or 1, num_blocks, random]` with `NO_BLOCK` in unused places, or `None`; a
            tensor while a graph is traced. Of rows that read everything it says nothing.
        is_causal: whether this is a decoder's.
    """

    num_blocks: int
    block_size: int
    window: int
    num_leading: int
    num_trailing: int = 0
    middle_blocks: tuple[int, ...] = ()
    first_block_extra: int = 0
    num_full: int = 0
    origin: Origin | None = field(default=None, repr=False)
    random_blocks: np.ndarray | Tensor | None = field(default=None, repr=False)
    is_causal: bool = False

    # Patterns that say the same are the same to caches: each call makes those of pruned heads, and of parts, anew.

    def __eq__(self, other) -> bool:
        return isinstance(other, BlockPattern) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    @cached_property
    def _value(self) -> tuple:
        *values, random, is_causal = (getattr(self, name) for name in self.__dataclass_fields__)
        return *values, is_causal, None if random is None else (np.asarray(random).tobytes(), random.shape)

    @property
    def num_bytes(self) -> int:
        """The memory that its random blocks take, in two forms, more or less."""
        return 1024 if self.random_blocks is None else 1024 + 2 * self.random_blocks.nbytes

    @property
    def before(self) -> int:
        """Blocks of the window before a block."""
        return self.window - 1 if self.is_causal else self.window // 2

    @property
    def after(self) -> int:
        """Blocks of the window behind a block."""
        return 0 if self.is_causal else self.window // 2

    @property
    def global_blocks(self) -> list[int]:
        """Blocks that are read by all; in an encoder they read everything, too."""
        return [*self.outer_blocks, *self.middle_blocks]

    @property
    def outer_blocks(self) -> list[int]:
        """The global blocks at the beginning and at the end."""
        return [*range(self.num_leading), *range(self.num_blocks - self.num_trailing, self.num_blocks)]

    @property
    def full_rows(self) -> list[int]:
        """Blocks that read everything, in a decoder everything up to themselves."""
        return [*range(self.first_row)] if self.is_causal else self.global_blocks

    @property
    def first_row(self) -> int:
        """The first block behind those at the beginning that read everything."""
        if self.is_causal:
            return self.num_full if self.num_full < self.num_blocks else self.num_blocks  # `min` would be traced
        return self.num_leading

    @property
    def last_row(self) -> int:
        """The first of the global blocks at the end."""
        return self.num_blocks - self.num_trailing

    @property
    def inner_rows(self) -> range:
        """The blocks whose whole window lies between the outer blocks. In a decoder all those behind the full ones."""
        if self.is_causal:
            return range(self.first_row, self.num_blocks)
        first = self.first_row + self.before
        return range(first, max(first, self.last_row - self.after))

    def for_heads(self, heads) -> "BlockPattern":
        """The pattern of some of the heads: what is left after others were pruned."""
        if self.random_blocks is None or len(self.random_blocks) in (1, len(heads)):
            return self
        origin = None if self.origin is None else self.origin._replace(heads=list(heads))
        return replace(self, random_blocks=self.random_blocks[list(heads)], origin=origin)

    def cut(self, first: int, last: int) -> "BlockPattern":
        """The blocks of an encoder from `first` to `last` as they read each other: what is left where all others are
        padding."""
        if last - first == self.num_blocks:
            return self
        random_blocks = self.random_blocks
        if random_blocks is not None:
            random_blocks = random_blocks[:, first:last] - first
            random_blocks = np.where((random_blocks >= 0) & (random_blocks < last - first), random_blocks, NO_BLOCK)
        return replace(
            self,
            num_blocks=last - first,
            num_leading=min(max(self.num_leading - first, 0), last - first),
            num_trailing=min(max(last - self.last_row, 0), last - first),
            middle_blocks=tuple(block - first for block in self.middle_blocks if first <= block < last),
            first_block_extra=self.first_block_extra if first == 0 else 0,
            random_blocks=random_blocks,
        )

    @cached_property
    def counts(self) -> np.ndarray:
        """`int64` array `[heads or 1, num_blocks, num_blocks]`: how many times block i reads block j."""
        heads = 1 if self.random_blocks is None else len(self.random_blocks)
        counts = np.zeros((heads, self.num_blocks, self.num_blocks), dtype=np.int64)
        counts[:, self._is_in_window()] = 1
        counts[:, :, [block for block in self.global_blocks if block < self.num_blocks]] = 1
        counts[:, :, 0] += self.first_block_extra
        if self.random_blocks is not None:
            head, row, slot = np.nonzero(self.random_blocks != NO_BLOCK)
            np.add.at(counts, (head, row, self.random_blocks[head, row, slot]), 1)
        counts[:, self.full_rows] = 1
        return counts * np.tri(self.num_blocks, dtype=np.int64) if self.is_causal else counts

    def lists(self, first: int, last: int, *, structured: bool = True) -> Tensor:
        """The blocks that the rows from `first` to `last` read: the outer ones, those of the window, and the random
        ones, each as often as it is read but for `first_block_extra`; `middle_blocks` are a matter of the engines.
        Written for tensors, so that a graph can be traced that serves any number of blocks.

        Args:
            first, last: no blocks that read everything among them.
            structured: False for the random blocks alone; there must be some then.

        Returns:
            `int64` tensor `[rows, heads or 1, blocks]`, with `NO_BLOCK` in empty places. If `structured`, the first
            column is block 0 wherever `first_block_extra` is not 0, and the window of a decoder's row ends with
            itself.
        """
        if self.random_blocks is None:
            return self._structured_lists(first, last)[:, None]
        random = torch.as_tensor(self.random_blocks)[:, first:last].transpose(0, 1)
        if not structured:
            return random
        lists = self._structured_lists(first, last)[:, None].expand(-1, random.shape[1], -1)
        return torch.cat((lists, random), dim=2)

    def _structured_lists(self, first: int, last: int) -> Tensor:
        window = torch.arange(first, last)[:, None] + torch.arange(-self.before, self.after + 1)
        window = window.masked_fill((window < self.num_leading) | (window >= self.last_row), NO_BLOCK)
        outer = torch.cat((torch.arange(self.num_leading), torch.arange(self.last_row, self.num_blocks)))
        return torch.cat((outer.expand(window.shape[0], -1), window), dim=1)

    def _is_in_window(self) -> np.ndarray:
        """`bool`, `[num_blocks, num_blocks]`."""
        block = np.arange(self.num_blocks)
        distance = block[:, None] - block
        return (distance <= self.before) & (distance >= -self.after)

    def kinds(self, head: int = 0) -> np.ndarray:
        """Why each block reads each other block in one head.

        Returns:
            `int64` array `[num_blocks, num_blocks]` of indices into `KINDS_OF_READING`.

        Raises:
            ValueError: if there is no such head. (Without random blocks all heads are alike, and any will do.)
        """
        counts = self.counts
        if len(counts) > 1 and not 0 <= head < len(counts):
            raise ValueError(f"head must be between 0 and {len(counts) - 1}, but is {head}.")
        none, random, window, global_, repeated = range(len(KINDS_OF_READING))
        kinds = np.where(counts[head if len(counts) > 1 else 0] > 0, random, none)
        kinds[self._is_in_window()] = window
        kinds[self.global_blocks] = global_
        kinds[:, self.global_blocks] = global_
        if self.first_block_extra:
            kinds[self.first_row : self.last_row, 0] = repeated
        return kinds

    def plot(self, ax=None, head: int = 0):
        """Draws who reads whom: a row for each block that reads, a column for each that is read.

        Args:
            ax: the matplotlib axes to draw on; those of a new figure by default.
            head: the attention head; heads differ in their random blocks.

        Returns:
            The axes.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: see `kinds`.
        """
        try:
            from matplotlib import colors, patches, pyplot
        except ImportError as error:
            raise ImportError("BlockPattern.plot needs matplotlib: pip install 'bigbird-plus[plot]'.") from error
        kinds = self.kinds(head)
        if ax is None:
            ax = pyplot.figure(layout="constrained").add_subplot()
        colour_map = colors.ListedColormap([*KINDS_OF_READING.values()])
        ax.imshow(kinds, cmap=colour_map, vmin=0, vmax=len(KINDS_OF_READING) - 1)
        ax.set(xlabel="block that is read", ylabel="block that reads")
        named = enumerate(KINDS_OF_READING.items())
        shown = [patches.Patch(color=color, label=name) for kind, (name, color) in named if kind in kinds]
        ax.legend(handles=shown, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(shown), frameon=False)
        return ax


MOST_BYTES = 64 * 2**20
"""Of the patterns that are kept: some twelve hundred with random blocks for twelve heads and 4,096 tokens."""


@cached_up_to(MOST_BYTES, lambda pattern: pattern.num_bytes)
def _make_pattern(sparsity: Sparsity, num_blocks: int, layer_idx: int | None) -> BlockPattern:
    """`layer_idx` is None for patterns without random blocks, which are the same in every layer."""
    pattern = sparsity.structure(num_blocks)
    if layer_idx is None:
        return replace(pattern, first_block_extra=sparsity.num_random_blocks if sparsity.is_original_shape else 0)
    return replace(pattern, random_blocks=_draw(sparsity, pattern, layer_idx))


@cached_up_to(MOST_BYTES, lambda pattern: pattern.num_bytes)
def _make_causal_pattern(sparsity: Sparsity, num_blocks: int, layer_idx: int | None) -> BlockPattern:
    """The same for decoders."""
    random_blocks = None if layer_idx is None else _causal_plan(sparsity, layer_idx).blocks(num_blocks)
    return replace(sparsity._causal_structure(num_blocks), random_blocks=random_blocks)


def _draw(sparsity: Sparsity, pattern: BlockPattern, layer_idx: int) -> np.ndarray:
    """The random blocks of a pattern that has none yet."""
    if sparsity.random_blocks is not None:
        plan = repeat_random_blocks(sparsity.own_plan(), pattern.num_blocks)
        distance = plan - np.arange(pattern.num_blocks)[:, None]
        is_in_window = (distance >= -pattern.before) & (distance <= pattern.after)
        return np.where(is_in_window | np.isin(plan, pattern.global_blocks), NO_BLOCK, plan)
    if sparsity.is_original_shape:
        return draw_random_blocks(
            num_heads=sparsity.num_layouts,
            num_blocks=pattern.num_blocks,
            block_size=sparsity.block_size,
            num_random_blocks=sparsity.num_random_blocks,
            max_position_embeddings=sparsity.random_plan_positions or sparsity.max_position_embeddings,
            layer_idx=layer_idx,
        )
    return draw_uniform_blocks(
        num_heads=sparsity.num_layouts,
        num_random_blocks=sparsity.num_random_blocks,
        layer_idx=layer_idx,
        eligible=pattern.counts[0] == 0,
    )


# torch 2.6 cannot make it of `list[int]`.
_SCHEMA = (
    "(SymInt[] settings, SymInt[]? indices, str? blocks, SymInt num_blocks, SymInt layer_idx, bool is_causal) "
    "-> Tensor"
)


@torch.library.custom_op("bigbird_plus::random_blocks", mutates_args=(), schema=_SCHEMA)
def _traced_random_blocks(
    settings: list[int],
    indices: list[int] | None,
    blocks: str | None,
    num_blocks: int,
    layer_idx: int,
    is_causal: bool,
) -> Tensor:
    """The random blocks as an operator: a graph is traced through it for any number of blocks, which NumPy's
    generators do not allow. `settings`, `indices` and `blocks` are the fields of a `Sparsity`."""
    pattern = Origin(settings, indices, blocks, num_blocks, layer_idx, is_causal).pattern()
    return torch.tensor(pattern.random_blocks)


@_traced_random_blocks.register_fake
def _(settings, indices, blocks, num_blocks, layer_idx, is_causal):
    sparsity = Sparsity._of_operators(settings, indices, blocks)
    return torch.empty(sparsity.num_layouts, num_blocks, sparsity.num_random_blocks, dtype=torch.int64)


@torch.compiler.assume_constant_result
def _plans_of_all_lengths(
    settings: list[int], indices: list[int] | None, blocks: str | None, layer_idx: int
) -> Tensor:
    """The random blocks of inputs of any length up to `max_position_embeddings`. An exported graph holds them: where
    it runs, there are neither NumPy's generators nor this package.

    Returns:
        `int16` tensor `[1 + most blocks, heads or 1, most blocks, random]`: for each number of blocks its plan, filled
        up with `NO_BLOCK`.
    """
    sparsity = Sparsity._of_operators(settings, indices, blocks)
    most = count_blocks(sparsity.max_position_embeddings, sparsity.block_size)
    plans = np.full((most + 1, sparsity.num_layouts, most, sparsity.num_random_blocks), NO_BLOCK, dtype=np.int16)
    for num_blocks in range(sparsity.full_attention_length // sparsity.block_size + 1, most + 1):
        plans[num_blocks, :, :num_blocks] = _draw(sparsity, sparsity.structure(num_blocks), layer_idx)
    return torch.tensor(plans)


@lru_cache(maxsize=256)
def _causal_plan(sparsity: Sparsity, layer_idx: int) -> CausalPlan:
    return CausalPlan(
        num_heads=sparsity.num_layouts,
        num_random_blocks=sparsity.num_random_blocks,
        first_row=sparsity.full_attention_length // sparsity.block_size,
        num_leading=(sparsity.num_global_blocks + 1) // 2,
        window=sparsity.num_sliding_window_blocks,
        layer_idx=layer_idx,
    )


@torch.compiler.assume_constant_result
def _longest_causal_plan(settings: list[int], indices: list[int] | None, blocks: str | None, layer_idx: int) -> Tensor:
    """The same for decoders, `int64`, `[heads or 1, most blocks, random]`: any shorter plan is its beginning."""
    sparsity = Sparsity._of_operators(settings, indices, blocks)
    most = count_blocks(sparsity.max_position_embeddings, sparsity.block_size)
    return torch.tensor(_causal_plan(sparsity, layer_idx).blocks(most))
