"""Batches of documents of different lengths as one row of real tokens: padding costs nothing.

Packing changes what a batch costs, not what it means: a packed document keeps the positions and the part of the
pattern that it has in the padded tensor. With `pattern_per_document` it gets those that it has alone.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .global_tokens import GlobalTokens, find_global_tokens
from .pattern import BlockPattern, Sparsity


class Span(NamedTuple):
    """One document of a packed batch.

    row: its row in the padded batch.
    first: place of the first of its tokens there.
    length: how many tokens are taken along, padding between them included.
    start: place of the first one in the packed row.
    size: places taken there: the length, filled up to whole blocks where attention is sparse.
    num_blocks: blocks of the pattern of which this document reads a part; None if it is read in full.
    first_block: block of that pattern with which the document begins.
    has_padding: whether there is padding among its places.
    """

    row: int
    first: int
    length: int
    start: int
    size: int
    num_blocks: int | None
    first_block: int
    has_padding: bool

    def pattern(self, sparsity: Sparsity, layer_idx: int, training: bool) -> BlockPattern:
        """Which of its blocks read which."""
        whole = sparsity.pattern(self.num_blocks, layer_idx=layer_idx, training=training)
        return whole.cut(self.first_block, self.first_block + self.size // sparsity.block_size)


class PackedInput(NamedTuple):
    """What all layers have to know of a packed batch.

    sparsity: the settings of the pattern.
    spans: the documents, in the order in which they are packed.
    places: `int64`, `[packed length]`: where each packed token comes from, in the flattened padded batch.
    positions: `int64`, `[1, packed length]`: default positions of the tokens.
    key_mask: `bool`, `[1, packed length]`, False for padding.
    global_tokens: those of each document, counted from its first place, or None.
    num_extra: extra global tokens of each document. They stand behind the packed tokens of all documents.
    batch, length: the shape of the padded batch.
    """

    sparsity: Sparsity
    spans: tuple[Span, ...]
    places: Tensor
    positions: Tensor
    key_mask: Tensor
    global_tokens: tuple[GlobalTokens | None, ...]
    num_extra: int
    batch: int
    length: int

    @property
    def has_global_tokens(self) -> bool:
        """Whether any document has single global tokens, extra ones among them."""
        return self.num_extra > 0 or any(tokens is not None for tokens in self.global_tokens)

    @property
    def has_one_pattern(self) -> bool:
        """Whether all documents are read sparsely, as parts of inputs that have the same pattern."""
        num_blocks = {span.num_blocks for span in self.spans}
        return len(num_blocks) == 1 and None not in num_blocks

    @property
    def mask_of_padding(self) -> Tensor | None:
        """The key mask, or None if there is no padding."""
        return self.key_mask if any(span.has_padding for span in self.spans) else None

    @property
    def extents(self) -> Tensor:
        """Of documents with one pattern, what `triton.block_sparse_attention` calls `documents`."""
        return _extents(self.spans, self.sparsity.block_size, self.places.device)

    def parts(self, states: Tensor, size: int) -> Iterator[tuple[Tensor, "PackedInput"]]:
        """Views of the packed `states`, `[1, packed length, ...]`, that hold documents of up to `size` tokens together
        or a longer one, and what layers have to know of each. For documents without extra tokens."""
        first = 0
        for last in range(1, len(self.spans) + 1):
            start = self.spans[first].start
            if last == len(self.spans) or self.spans[last].start + self.spans[last].size - start > size:
                taken = slice(start, self.spans[last - 1].start + self.spans[last - 1].size)
                yield states[:, taken], self._part(first, last, taken)
                first = last

    def _part(self, first: int, last: int, taken: slice) -> "PackedInput":
        spans = tuple(span._replace(start=span.start - taken.start) for span in self.spans[first:last])
        places, positions, key_mask = self.places[taken], self.positions[:, taken], self.key_mask[:, taken]
        return self._replace(
            spans=spans,
            places=places,
            positions=positions,
            key_mask=key_mask,
            global_tokens=self.global_tokens[first:last],
        )

    def only_document(self, layer_idx: int) -> tuple[BlockPattern, Tensor | None] | None:
        """Pattern in inference and key mask of the document, if there is one alone and it is read sparsely."""
        span = self.spans[0]
        if len(self.spans) > 1 or span.num_blocks is None:
            return None
        pattern = span.pattern(self.sparsity, layer_idx, training=False)
        return pattern, self.key_mask if span.has_padding else None

    def pack(self, tensor: Tensor | None) -> Tensor | None:
        """`[batch or 1, length, ...]` -> `[1, packed length, ...]`."""
        if tensor is None:
            return None
        return tensor.expand(self.batch, *tensor.shape[1:]).flatten(0, 1)[self.places][None]

    def unpack(self, packed: Tensor) -> Tensor:
        """`[1, packed length, ...]` -> `[batch, length, ...]`, with zeros for padding and without the extra tokens."""
        padded = packed.new_zeros(self.batch * self.length, *packed.shape[2:])
        packed = packed[:, : len(self.places)]
        padded = padded.index_put((self.places[self.key_mask[0]],), packed[self.key_mask])
        return padded.unflatten(0, (self.batch, self.length))

    def split(self, tensor: Tensor) -> list[Tensor]:
        """`[1, heads, packed length and extra tokens, ...]` -> of each document its own places and extra tokens."""
        documents = list(tensor[:, :, : len(self.places)].split([span.size for span in self.spans], dim=2))
        if not self.num_extra:
            return documents
        extra = tensor[:, :, len(self.places) :].split(self.num_extra, dim=2)
        return [torch.cat(pair, dim=2) for pair in zip(documents, extra, strict=True)]

    def join(self, documents: list[Tensor]) -> Tensor:
        """The reverse of `split`."""
        if not self.num_extra:
            return torch.cat(documents, dim=2)
        sizes = [span.size for span in self.spans]
        places = [tensor[:, :, :size] for tensor, size in zip(documents, sizes, strict=True)]
        extra = [tensor[:, :, size:] for tensor, size in zip(documents, sizes, strict=True)]
        return torch.cat((*places, *extra), dim=2)


@lru_cache(maxsize=8)  # asked for once a layer
@torch.inference_mode(False)  # the same tensor can be saved for a backward pass later
def _extents(spans: tuple[Span, ...], block_size: int, device: torch.device) -> Tensor:
    extents = [
        (span.start - span.first_block * block_size, span.first_block, span.first_block + span.size // block_size)
        for span in spans
    ]
    return torch.tensor(extents, dtype=torch.int32, device=device)


def pack_documents(
    sparsity: Sparsity,
    mask: Tensor,
    *,
    reads_sparsely: bool,
    per_document: bool,
    chosen: Tensor | None = None,
    num_extra: int = 0,
) -> PackedInput | None:
    """Packs a batch, unless that would save nothing.

    Args:
        mask: `bool`, `[batch, length]`: which tokens are real.
        reads_sparsely: whether attention to an input of this length is sparse.
        per_document: whether each document is read as it is alone: counted from its first real token, with a pattern
            of its own, or in full where it is short enough.
        chosen: `bool`, `[batch, length]`: which tokens are global; None for none.
        num_extra: extra global tokens that each document has besides.
    """
    batch, length = mask.shape
    spans, start = [], 0
    for row, tokens in enumerate(mask.cpu().unbind()):
        if tokens.any():
            spans.append(_span(sparsity, row, tokens, start, reads_sparsely, per_document))
            start += spans[-1].size
    block_size = sparsity.block_size if reads_sparsely else 1
    if not spans or (not per_document and start >= batch * -(-length // block_size) * block_size):
        return None
    places, positions, real = (torch.zeros(start, dtype=torch.int64) for _ in range(3))
    for span in spans:
        taken, source = slice(span.start, span.start + span.length), torch.arange(span.length) + span.first
        places[taken] = source + span.row * length
        positions[taken] = source - span.first if per_document else source
        real[taken] = 1
    places, positions, real = (tensor.to(mask.device) for tensor in (places, positions, real))
    key_mask = mask.flatten()[places] & real.bool()
    chosen = None if chosen is None else chosen.flatten()[places] & key_mask
    global_tokens = tuple(_global_tokens(span, chosen, num_extra, mask.device) for span in spans)
    return PackedInput(
        sparsity, tuple(spans), places, positions[None], key_mask[None], global_tokens, num_extra, batch, length
    )


def _global_tokens(span, chosen, num_extra, device) -> GlobalTokens | None:
    """Those of one document that is read sparsely."""
    if span.num_blocks is None:
        return None
    if chosen is not None:
        chosen = chosen[None, span.start : span.start + span.size]
    return find_global_tokens(chosen, num_extra, 1, span.size, device)


def _span(sparsity, row, tokens, start, reads_sparsely, per_document) -> Span:
    """The span of one row of the mask."""
    block_size = sparsity.block_size
    real = tokens.nonzero().flatten()
    first, end = int(real[0]), int(real[-1]) + 1
    num_blocks, first_block = None, 0
    if per_document:
        reads_sparsely = reads_sparsely and end - first > sparsity.full_attention_length
        num_blocks = -(-(end - first) // block_size)
    elif reads_sparsely:
        first_block, num_blocks = first // block_size, -(-len(tokens) // block_size)
        first, end = first_block * block_size, min(-(-end // block_size) * block_size, len(tokens))
    length = end - first
    size = -(-length // block_size) * block_size if reads_sparsely else length
    return Span(row, first, length, start, size, num_blocks if reads_sparsely else None, first_block, len(real) < size)
