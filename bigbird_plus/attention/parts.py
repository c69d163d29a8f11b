"""Documents that are read together, and how: in full, sparsely, or as a decoder's text."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import full, masks
from .common import count_blocks, cut, has_free_shapes, is_exporting, may_read_values, pad_to_blocks, to_device
from .context_parallel import Reading, Shards, attend_together, full_pattern
from .engines import Choice, Engine
from .global_tokens import GlobalTokens, find_global_tokens
from .impl import gather, reference
from .impl.gather import Piece
from .masks import NO_MASK, FullMask
from .pattern import BlockPattern, Sparsity
from .processes import Processes


class Tokens(NamedTuple):
    """What a call brings.

    batch: sequences.
    cache_position: `int64`, `[length]`: places of the tokens among the keys.
    dtype: what hidden states consist of.
    attention_mask, global_attention_mask, position_ids: as the user gave them.
    past: how many tokens a cache already holds.
    keys: how many keys there are, free places of a cache included; None without a cache.
    has_documents: whether rows hold several documents, as `position_ids` tell.
    wanted: `bool`, `[1 or batch, length]`: places whose states are wanted even of padding; None for none.
    """

    batch: int
    cache_position: Tensor
    dtype: torch.dtype
    attention_mask: Tensor | None = None
    global_attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    past: int | Tensor = 0
    keys: int | None = None
    has_documents: bool = False
    wanted: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        return self.cache_position.shape[0]

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.cache_position.device

    @property
    def has_cache(self) -> bool:
        """Whether there is a cache, filled or not."""
        return self.keys is not None


class Document(NamedTuple):
    """One that is read sparsely, alone.

    pattern: which block reads which, in inference.
    key_mask: `bool`, `[1, tokens of its blocks]`, False for padding; None where there is none.
    first: the place of its first token. Before it there is padding.
    """

    pattern: BlockPattern
    key_mask: Tensor | None
    first: int = 0


P = TypeVar("P", bound="Part")


@dataclass(frozen=True)
class Part:
    """Documents that are read alike. In a packed row there are so many `documents` of `size` places from `start` on;
    else they are the whole batch."""

    start: int = 0
    size: int = 0
    documents: int = 0

    @property
    def end(self) -> int:
        """The place behind them."""
        return self.start + self.documents * self.size

    @property
    def is_full(self) -> bool:
        """Whether their tokens read each other in full."""
        return False

    def take(self, row: Tensor) -> Tensor:
        """`[1, heads, row, dim]` -> `[documents, heads, size, dim]`: a view."""
        return row[0, :, self.start : self.end].unflatten(1, (self.documents, self.size)).transpose(0, 1)

    def some(self: P, documents: slice) -> P:
        """Some of the documents. Those of a packed row stay where they are."""
        start, stop, _ = documents.indices(self.documents)
        return replace(self, start=self.start + start * self.size, documents=stop - start)


@dataclass(frozen=True)
class FullPart(Part):
    """Documents whose tokens read each other in full."""

    mask: FullMask = NO_MASK
    implementation: str = "eager"

    @property
    def is_full(self) -> bool:
        return True

    def attend(self, module, query, key, value, output_attentions=False) -> tuple[Tensor, Tensor | None]:
        """See `Plan.attend`."""
        kwargs = {"implementation": self.implementation, "output_attentions": output_attentions}
        return full.attend(module, query, key, value, self.mask, **kwargs)

    def some(self, documents: slice) -> "FullPart":
        mask = FullMask(*(t if t is None or t.shape[0] == 1 else t[documents] for t in self.mask))
        return replace(super().some(documents), mask=mask)


@dataclass(frozen=True, kw_only=True)
class SparsePart(Part):
    """Documents that are read sparsely, each of them a part of an input of `num_blocks` blocks that begins with the
    block `first_block`.

    key_mask: `bool`, `[documents, size and extra tokens]`, False for padding; None where there is none.
    global_tokens: single tokens that read everything and are read by all; None for none.
    """

    sparsity: Sparsity
    choice: Choice
    num_blocks: int
    first_block: int = 0
    is_causal: bool = False
    key_mask: Tensor | None = None
    global_tokens: GlobalTokens | None = None

    def whole_pattern(self, layer_idx: int, training: bool) -> BlockPattern:
        """That of the input of which each document is a part."""
        if self.is_causal:
            return self.sparsity.causal_pattern(self.num_blocks, layer_idx=layer_idx)
        return self.sparsity.pattern(self.num_blocks, layer_idx=layer_idx, training=training)

    def pattern(self, layer_idx: int, training: bool) -> BlockPattern:
        """Which block of a document reads which."""
        pattern = self.whole_pattern(layer_idx, training)
        if not self.documents:
            return pattern
        return pattern.cut(self.first_block, self.first_block + self.size // self.sparsity.block_size)

    def attend(self, module, query, key, value, output_attentions=False) -> tuple[Tensor, Tensor | None]:
        """See `Plan.attend`. Asking a linear engine for probabilities computes them besides: the context stays the
        same to the bit."""
        pattern = self.pattern(module.layer_idx, module.training).for_heads(module.heads)
        arguments = (query, key, value, pattern, self.key_mask, self.global_tokens)
        if self.choice.engine is reference:
            context, probabilities = reference.attention(*arguments, scaling=module.scaling)
            return context, probabilities if output_attentions else None
        context = self.choice.engine.forward(*arguments, scaling=module.scaling)
        if not output_attentions:
            return context, None
        return context, reference.attention(*arguments, scaling=module.scaling)[1]

    def document(self, module) -> Document:
        """The only one, as the attention `module` reads it."""
        return Document(self.pattern(module.layer_idx, training=False).for_heads(module.heads), self.key_mask)

    def some(self, documents: slice) -> "SparsePart":
        key_mask = None if self.key_mask is None else self.key_mask[documents]
        tokens = None if self.global_tokens is None else self.global_tokens.of_documents(documents)
        return replace(super().some(documents), key_mask=key_mask, global_tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class DecoderPart(Part):
    """A decoder's batch, read sparsely, perhaps as a piece that goes on where a cache ends.

    choice: the engine for whole inputs.
    piece: where the tokens stand.
    num_keys: keys to take notice of; a static cache has more while it is being filled from the start.
    from_start: whether the input has no past.
    key_mask: `bool`, `[batch, num_keys]`, False for padding; None where there is none behind the first real token.
    """

    sparsity: Sparsity
    choice: Choice
    piece: Piece
    num_keys: int
    from_start: bool
    key_mask: Tensor | None

    def attend(self, module, query, key, value, output_attentions=False) -> tuple[Tensor, Tensor | None]:
        """See `Plan.attend`. The context of padding is zero."""
        pattern = self._pattern(module, self.num_keys)
        is_eager, probabilities = self.choice.engine is reference, None
        if is_eager or output_attentions:
            context, probabilities = self._by_definition(query, key, value, pattern, module.scaling)
        if is_eager:
            return context, probabilities if output_attentions else None
        attend = self._from_start if self.from_start else self._from_cache
        context = attend(query, key, value, pattern, module.scaling)
        is_real = self._is_real()
        return context if is_real is None else context.masked_fill(~is_real[:, None, :, None], 0), probabilities

    def document(self, module) -> Document:
        """The only one, from its start, as the attention `module` reads it."""
        first = 0 if self.piece.offset is None else int(self.piece.offset)
        key_mask = self.key_mask
        if key_mask is not None:
            key_mask = pad_to_blocks(key_mask[:, first:], self.sparsity.block_size, 1)
        return Document(self._pattern(module, self.num_keys - first), key_mask, first)

    def some(self, documents: slice) -> "DecoderPart":
        key_mask = None if self.key_mask is None else self.key_mask[documents]
        offset = None if self.piece.offset is None else self.piece.offset[documents]
        return replace(super().some(documents), key_mask=key_mask, piece=self.piece._replace(offset=offset))

    def _pattern(self, module, tokens: int) -> BlockPattern:
        """That of so many tokens."""
        num_blocks = count_blocks(tokens, self.sparsity.block_size)
        return self.sparsity.causal_pattern(num_blocks, layer_idx=module.layer_idx).for_heads(module.heads)

    def _is_real(self) -> Tensor | None:
        """`bool`, `[batch, queries]`: which of the input's tokens are not padding; None for all."""
        places, offset = self.piece.positions, self.piece.offset
        if self.key_mask is not None:
            return self.key_mask[:, places]
        return None if offset is None else places >= offset[:, None]

    def _by_definition(self, query, key, value, pattern, scaling):
        """Free places of a static cache get probabilities, too: zeros."""
        key_mask = self.key_mask
        if key_mask is not None:
            key_mask = nn.functional.pad(key_mask, (0, key.shape[2] - self.num_keys))
        kwargs = {"places": self.piece.positions, "offset": self.piece.offset, "key_mask": key_mask}
        return reference.causal_attention(query, key, value, pattern, **kwargs, scaling=scaling)

    def _from_start(self, query, key, value, pattern, scaling):
        """Engines count blocks from the first place, so left padding is moved behind the tokens, and back. There no
        token reads it, nor what fills up the last block."""
        tensors = [query, *(tensor[:, :, : self.num_keys] for tensor in (key, value))]
        block_size = self.sparsity.block_size
        moves = self._find_moves() if has_free_shapes() else self._moves  # torch.compile traces no kept property
        if moves is not None:
            tensors = [_move(tensor, moves.to_front) for tensor in tensors]
        tensors = [pad_to_blocks(tensor, block_size, 2) for tensor in tensors]
        key_mask = self.key_mask if moves is None else moves.key_mask
        key_mask = None if key_mask is None else pad_to_blocks(key_mask, block_size, 1)
        context = self.choice.engine.forward(*tensors, pattern, key_mask, None, scaling=scaling)
        context = cut(context, self.num_keys, 2)
        return context if moves is None else _move(context, moves.back)

    @cached_property
    def _moves(self) -> "Moves | None":
        """The same for all layers."""
        return self._find_moves()

    def _find_moves(self) -> "Moves | None":
        """How left padding is moved; None where there is none."""
        offset, key_mask, count = self.piece.offset, self.key_mask, self.num_keys
        if offset is None:
            return None
        sequence = torch.arange(offset.shape[0], device=offset.device)[:, None]
        places = torch.arange(count, device=offset.device) - count  # below 0: counted from the end
        to_front, back = (sequence, places + offset[:, None]), (sequence, places + (count - offset)[:, None])
        return Moves(to_front, back, None if key_mask is None else key_mask[to_front])

    def _from_cache(self, query, key, value, pattern, scaling):
        return gather.attend_to_cache(query, key, value, pattern, self.key_mask, self.piece, scaling=scaling)


class Moves(NamedTuple):
    """How left padding is moved behind the tokens, and back: what falls off in front comes in again at the end.

    to_front, back: `int64`, `[batch, 1]` and `[batch, length]`: of each place, the sequence, and the place there, that
        goes to it.
    key_mask: that of the moved tokens; None if it hides nothing else.
    """

    to_front: tuple[Tensor, Tensor]
    back: tuple[Tensor, Tensor]
    key_mask: Tensor | None


def _move(tensor: Tensor, source: tuple[Tensor, Tensor]) -> Tensor:
    """What comes from `source` of `[batch, heads, length, dim]`."""
    return tensor.transpose(1, 2)[source].transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class SharedPart(Part):
    """Documents that processes share. What is attended to are the tokens of this process, filled up to whole blocks,
    and behind them the extra ones: those of all processes are alike as they enter, and those of the last one count.

    processes, shards: who holds what.
    block_size: tokens in a block.
    sparsity: what patterns are made of; None if documents are read in full.
    is_causal: whether they are a decoder's.
    engine, key_mask, global_tokens: see `context_parallel.Reading`.
    """

    processes: Processes
    shards: Shards
    block_size: int
    sparsity: Sparsity | None
    is_causal: bool
    engine: Engine | None
    key_mask: Tensor | None
    global_tokens: GlobalTokens | None

    @property
    def is_full(self) -> bool:
        return self.sparsity is None

    def attend(self, module, query, key, value, output_attentions=False) -> tuple[Tensor, None]:
        """See `Plan.attend`.

        Raises:
            ValueError: for probabilities, and for dropout of them.
        """
        refuse_probabilities(output_attentions)
        if self.sparsity is None and module.dropout_prob:
            raise ValueError(
                f"attention_probs_dropout_prob ({module.dropout_prob}) has an effect where attention is full, as it "
                "is for inputs so short, but not within context_parallel: set it to 0 for training."
            )
        fields = (self.processes, self.shards, self._pattern(module), self.engine, self.key_mask, self.global_tokens)
        return attend_together(query, key, value, Reading(*fields), scaling=module.scaling), None

    def _pattern(self, module) -> BlockPattern:
        num_blocks = self.shards.bounds[-1]
        if self.sparsity is None:
            return full_pattern(num_blocks, self.block_size, self.is_causal)
        if self.is_causal:
            pattern = self.sparsity.causal_pattern(num_blocks, layer_idx=module.layer_idx)
        else:
            pattern = self.sparsity.pattern(num_blocks, layer_idx=module.layer_idx, training=module.training)
        return pattern.for_heads(module.heads)


def refuse_probabilities(output_attentions: bool) -> None:
    """Raises a `ValueError` if they are asked for where processes share documents."""
    if output_attentions:
        raise ValueError("output_attentions=True is not for context_parallel: no process has all probabilities.")


AnyPart = FullPart | SparsePart | DecoderPart | SharedPart


def whole_batch(
    sparsity: Sparsity, mask: Tensor | None, tokens: Tokens, choose, *, global_mask: Tensor | None, num_extra: int = 0
) -> SparsePart:
    """The part that is a batch as it came: tokens of `mask` (`bool`, or None for all) are real and those of
    `global_mask` (`bool`, none of padding, or None for none) global, with so many extra global tokens behind the last
    block. `choose` is told whether there are global tokens, and chooses the engine."""
    block_size, batch, length = sparsity.block_size, tokens.batch, tokens.length
    num_blocks = count_blocks(length, block_size)
    if mask is None and (has_free_shapes() or length % block_size):
        mask = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    if (
        mask is not None and is_exporting()
    ):  # ONNX keeps no guards: shorter inputs, which have no such place, shall fail there all the same
        mask = mask & (torch.arange(length, device=tokens.device)[sparsity.full_attention_length] > 0)
    found = find_global_tokens(global_mask, num_extra, batch, num_blocks * block_size, tokens.device)
    if mask is not None:
        mask = nn.functional.pad(pad_to_blocks(mask, block_size, 1), (0, num_extra), value=True)
    choice = choose(found is not None)
    return SparsePart(sparsity=sparsity, choice=choice, num_blocks=num_blocks, key_mask=mask, global_tokens=found)


def decoder_part(sparsity: Sparsity, tokens: Tokens, choice: Choice, real: Tensor | None = None) -> DecoderPart:
    """The part that is a decoder's batch, read sparsely. `real` is its mask, on the CPU, if that was looked at."""
    queries, block_size, past, places = tokens.length, sparsity.block_size, tokens.past, tokens.cache_position
    keys = queries if tokens.keys is None else tokens.keys
    mask = masks.decoder_key_mask(
        tokens.attention_mask if real is None else real,
        batch=tokens.batch,
        query_positions=places,
        past=past,
        keys=keys,
    )
    offset, most_padding = None, 0
    if mask is not None:
        offset, most_padding = mask.to(torch.uint8).argmax(dim=-1), keys
        if isinstance(past, int) and may_read_values(mask):
            most_padding = int(offset.max())
            if (offset + mask[:, : past + queries].sum(dim=-1) == past + queries).all():
                mask = None
            offset = to_device(offset, tokens.device) if most_padding else None
    first, end = 0, count_blocks(keys, block_size)
    if isinstance(past, int):
        first, end = max(past - most_padding, 0) // block_size, count_blocks(past + queries, block_size)
    from_start = isinstance(past, int) and past == 0
    if from_start:
        keys = queries
        mask = None if mask is None else to_device(mask[:, :keys], tokens.device)
    piece = Piece(places, offset, first, end)
    return DecoderPart(
        sparsity=sparsity, choice=choice, piece=piece, num_keys=keys, from_start=from_start, key_mask=mask
    )
