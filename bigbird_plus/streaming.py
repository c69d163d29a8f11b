"""Layers in inference on a CPU that write over their input, some tokens after others, so that little of what they
compute is there at once."""

import torch
from torch import Tensor

from .attention.common import attention_dtype, chunks, cut, pad_to_blocks
from .attention.impl.flash_cpu import KeysFirst, Stream, is_streamable
from .attention.parts import Document
from .attention.rotary import Rotation


def keys_and_values(layer, states: Tensor, rotation: Rotation | None, size: int, *, for_cache: bool) -> list[Tensor]:
    """Those of a `BigBirdLayer`, of so many tokens at a time.

    Args:
        layer, rotation, size: see `stream_document`.
        states: `[batch, length, hidden_size]`.
        for_cache: whether in the dtype of the projections; else in that in which attention is computed.

    Returns:
        Both `[batch, length, heads, head_dim]`, and behind them zeros, which fill up the last block of a document
        wherever it starts.
    """
    attention, (batch, length) = layer.attention.self, states.shape[:2]
    read: list[Tensor] = []
    for places in chunks(0, length, max(1, size // batch)):
        run = slice(places.start, places.stop)
        own = attention.keys_and_values(layer.attention.LayerNorm(states[:, run]), rotation and rotation.of(run))
        own = [tensor.transpose(1, 2) for tensor in own]
        if not read:
            shape = batch, length + layer.config.block_size - 1, *own[0].shape[2:]
            dtype = own[0].dtype if for_cache else attention_dtype(own[0])
            read = [tensor.new_empty(shape, dtype=dtype) for tensor in own]
        for whole, piece in zip(read, own, strict=True):
            whole[:, run] = piece
    for whole in read:
        whole[:, length:] = 0
    return read


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
        cached: its `keys_and_values`, where they are there already.
    """
    first, pattern = document.first, document.pattern
    _skip_padding(layer, states[:, :first], size)
    states, rotation = states[:, first:], rotation and rotation.of(slice(first, None))
    run = _Run(layer, states, document, rotation, max(1, size // pattern.block_size))
    if cached is not None:
        run.keys_first(*(tensor[:, first:] for tensor in cached))
    elif is_streamable(pattern):
        run.in_order()
    else:
        run.keys_first(*keys_and_values(layer, states, rotation, size, for_cache=False))


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

    def keys_first(self, key: Tensor, value: Tensor) -> None:
        """Whatever the rows read, of keys and values of the whole document."""
        reader = KeysFirst(self.pattern, key, value, self.key_mask, scaling=self.attention.scaling)
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
