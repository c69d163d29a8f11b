"""Layers in inference on a CPU that write over their input, some tokens after others, so that little of what they
compute is there at once."""

import torch
from torch import Tensor

from .attention.common import chunks, cut, pad_to_blocks
from .attention.impl.flash_cpu import KeysFirst, Stream, is_streamable
from .attention.parts import Document
from .attention.rotary import Rotation
from .cpu import in_chunks


def keys_and_values(layer, states: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
    """Those of a `BigBirdLayer`, `[batch, heads, length, head_dim]`, of states `[batch, length, hidden_size]`."""
    attention = layer.attention.self

    def project(states, *turned):
        read = attention.keys_and_values(layer.attention.LayerNorm(states), Rotation(*turned) if turned else None)
        return torch.stack([tensor.transpose(1, 2) for tensor in read], dim=2)

    width = 2 * attention.all_head_size
    both = in_chunks(project, states, *(rotation or ()), width=width, modules=layer.attention.children())
    key, value = (tensor.transpose(1, 2) for tensor in both.unbind(2))
    return key, value


def stream_document(
    layer,
    states: Tensor,
    document: Document,
    rotation: Rotation | None,
    size: int,
    cached: list[Tensor] | None = None,
) -> None:
    """Writes what a layer makes of a document over its states.

    Args:
        layer: a `BigBirdLayer`.
        states: `[1, length, hidden_size]`.
        document: how they are read.
        rotation: of queries and keys; None for models without rotary positions.
        size: how many tokens are taken together.
        cached: keys and values, `[1, heads, length or more, head_dim]`, where they are there already.
    """
    first, length = document.first, states.shape[1]
    _skip_padding(layer, states[:, :first], size)
    rotation = rotation and rotation.of(slice(first, None))
    run = _Run(layer, states[:, first:], document, rotation, max(1, size // document.pattern.block_size))
    if cached is None and is_streamable(document.pattern):
        run.in_order()
    else:
        run.keys_first(cached and [tensor[:, :, first:length] for tensor in cached])


def _skip_padding(layer, states: Tensor, size: int) -> None:
    """Padding reads nothing."""
    attention = layer.attention.self
    for places in chunks(0, states.shape[1], size):
        run = states[:, places.start : places.stop]
        context = run.new_zeros(1, attention.num_attention_heads, len(places), attention.attention_head_size)
        run.copy_(_after_attention(layer, context, run))


def _after_attention(layer, context: Tensor, states: Tensor) -> Tensor:
    """The new states, `[1, tokens, hidden_size]`, from those before and from what attention has read, `[1, heads,
    tokens, head_dim]`."""
    return layer.feed_forward_chunk(layer.attention.output(context.transpose(1, 2).flatten(2), states))


class _Run:
    """A layer that goes through a document, `[1, length, hidden_size]`, so many blocks at a time."""

    def __init__(self, layer, states: Tensor, document: Document, rotation: Rotation | None, size: int):
        self.layer, self.attention, self.states = layer, layer.attention.self, states
        self.pattern, self.key_mask, _ = document
        self.rotation, self.size = rotation, size

    def in_order(self) -> None:
        """Where rows read their windows and the outer blocks alone. What that takes does not grow with the length."""
        pattern, block_size = self.pattern, self.pattern.block_size
        ends = slice(pattern.first_row * block_size), slice(pattern.last_row * block_size, None)
        full_states = self._states(*ends)
        query, key, value = self._project(self.attention.queries_keys_and_values, *ends)
        stream = Stream(pattern, query, key, value, self.key_mask, scaling=self.attention.scaling)
        for rows in chunks(pattern.first_row, pattern.last_row, self.size):
            blocks = stream.blocks_before(rows)
            if blocks:
                stream.read(*self._keys_and_values(stream.tokens(blocks)))
            own = stream.tokens(rows)
            self._write(stream.attend(rows, self._queries(own)), own)
        full_states = self._after_attention(stream.full_context(), full_states)
        first, last = (self.states[:, end] for end in ends)
        first.copy_(full_states[:, : first.shape[1]])
        last.copy_(full_states[:, first.shape[1] :])

    def keys_first(self, cached: list[Tensor] | None) -> None:
        """Whatever the rows read. Keys and values of the whole document are there at once."""
        reader = KeysFirst(self.pattern, self.key_mask, scaling=self.attention.scaling)
        if cached is not None:
            reader.read(0, *cached)
        else:
            for blocks in chunks(0, self.pattern.num_blocks, self.size):
                places = reader.tokens(blocks)
                reader.read(places.start, *self._keys_and_values(places))
        for rows in reader.runs(self.size):
            own = reader.tokens(rows)
            self._write(reader.attend(rows, self._queries(own)), own)

    def _states(self, *places: slice) -> Tensor:
        """Those of runs of tokens, one behind another."""
        runs = [self.states[:, run] for run in places]
        return torch.cat(runs, dim=1) if len(runs) > 1 else runs[0]

    def _project(self, projection, *places: slice) -> list[Tensor]:
        """What a projection of the attention makes of runs of tokens, filled up to whole blocks."""
        states = self.layer.attention.LayerNorm(self._states(*places))
        found = projection(states, self.rotation and self.rotation.of(*places))
        return [pad_to_blocks(tensor, self.pattern.block_size, 2) for tensor in found]

    def _queries(self, places: slice) -> Tensor:
        return self._project(lambda *entering: (self.attention.queries(*entering),), places)[0]

    def _keys_and_values(self, places: slice) -> list[Tensor]:
        return self._project(self.attention.keys_and_values, places)

    def _write(self, context: Tensor, places: slice) -> None:
        """What comes to some tokens, over their states."""
        run = self.states[:, places]
        run.copy_(self._after_attention(context, run))

    def _after_attention(self, context: Tensor, states: Tensor) -> Tensor:
        return _after_attention(self.layer, cut(context, states.shape[1], 2), states)
