"""Documents that are read as they are alone, several in a row or one in each, and that processes share.

All documents, each filled up to whole blocks, make one row of blocks, of which each process computes a run. So a
document is computed by one process, as ever, or shared by neighbours. Short ones are never cut. At the end each
process is given the states of its columns of the batch.
"""

from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .common import count_blocks, to_device
from .context_parallel import Shards
from .documents import first_places, first_tokens
from .engines import Choice
from .global_tokens import find_global_tokens
from .parts import AnyPart, SharedPart, refuse_probabilities
from .plan import Packing, Plan, Reader, Span, check_length, choose_for_documents, pack, packed_parts, positions_of
from .processes import Processes


class Columns(NamedTuple):
    """Which columns of a batch each process is given the states of, and where those come from.

    bounds: the first column of each process, and the number of all.
    computed: `int64`, `[tokens]`: places among what this process computes, one process that gets them after another.
    sent, received: how many tokens go to, and come from, each process.
    places: `int64`, `[tokens]`: where what comes stands among `[batch, own columns]`, flattened.
    """

    bounds: list[int]
    computed: Tensor
    sent: list[int]
    received: list[int]
    places: Tensor


@dataclass(frozen=True, kw_only=True)
class SharedDocuments(Plan):
    """What layers get are packed documents: the shared ones, as far as this process computes them, and its own. So
    `batch` and `length` are those of the packed row.

    packing: see `Plan`.
    processes: those that share.
    rows: how many rows the batch has.
    columns: whose states are returned.
    """

    packing: Packing
    processes: Processes
    rows: int
    columns: Columns

    @property
    def own_columns(self) -> range:
        """Those of this process."""
        first, last = self.columns.bounds[self.processes.rank :][:2]
        return range(first, last)

    def own_tokens(self, *tensors):
        """In the layout of the plan already: what others compute is not to be embedded here."""
        return tuple(None if tensor is None else self._pack(tensor) for tensor in tensors)

    def _pack(self, tensor: Tensor) -> Tensor:
        return tensor.expand(self.rows, *tensor.shape[1:]).flatten(0, 1)[self.packing.sources][None]

    def enter(self, states: Tensor) -> Tensor:
        return states

    def leave(self, states: Tensor) -> Tensor:
        columns, shape = self.columns, (self.rows, len(self.own_columns))
        tokens = self.processes.exchange(states[0, columns.computed], columns.sent, columns.received)
        batch = tokens.new_zeros(shape[0] * shape[1], *tokens.shape[1:])
        return batch.index_copy(0, columns.places, tokens).unflatten(0, shape)

    def first_states(self, states, attention_mask, config, position_ids):
        if position_ids is not None:
            rows, places = first_tokens(position_ids, self.rows)
        else:
            places = first_places(states, attention_mask, config)
            rows = torch.arange(self.rows, device=places.device)
        owners = torch.bucketize(places, places.new_tensor(self.columns.bounds[1:-1]), right=True)
        is_own = owners == self.processes.rank
        own = states[rows[is_own], places[is_own] - self.own_columns.start]
        return self.processes.gather(own, dim=0)[owners.argsort(stable=True).argsort()]

    def attend(self, module, query, key, value, output_attentions=False):
        refuse_probabilities(output_attentions)
        if not self.parts:  # there are fewer documents than processes
            return query + key + value, None  # nothing, but with gradients
        return super().attend(module, query, key, value)

    @property
    def can_stream(self) -> bool:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Making it
# ---------------------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A document, and who computes which of its blocks."""

    span: Span
    shards: Shards

    @property
    def is_shared(self) -> bool:
        """Whether several processes do."""
        return self.shards.holders > 1

    def of(self, rank: int, block_size: int) -> Span:
        """What a process computes of it."""
        blocks = self.shards.blocks(rank)
        first, last = (min(block * block_size, self.span.length) for block in (blocks.start, blocks.stop))
        return self.span._replace(first=self.span.first + first, length=last - first, size=len(blocks) * block_size)


def share_documents(reader: Reader, spans: list[Span], processes: Processes, *, per_document: bool) -> SharedDocuments:
    """The plan of documents whose blocks are counted from their first token: of those of `find_documents`, which are
    read as they are alone (`per_document`), or of rows. A span that goes on behind a row's end begins it anew."""
    tokens, block_size = reader.tokens, reader.config.block_size
    check_length(reader.config, tokens, max(span.length for span in spans))
    pieces = _cut(reader, spans, processes)
    shared = [piece for piece in pieces if piece.is_shared]
    own = [piece.span for piece in pieces if piece.shards.own and not piece.is_shared]
    own = sorted(own, key=lambda span: span.kind)
    packing = pack([*(piece.of(processes.rank, block_size) for piece in shared), *own], reader)
    choice = choose_for_documents(reader, spans)
    parts: list[AnyPart] = []
    for piece in shared:
        parts.append(_shared_part(reader, piece, processes, choice, start=parts[-1].end if parts else 0))
    return SharedDocuments(
        (*parts, *packed_parts(reader, packing, own, choice)),
        batch=1,
        length=len(packing.sources),
        positions=positions_of(reader, spans, per_document),
        choice=choice,
        num_extra=reader.config.num_extra_global_tokens,
        packing=packing.to_device(tokens.device),
        processes=processes,
        rows=tokens.batch,
        columns=_columns(_owners(pieces, reader), packing, processes, tokens.device),
    )


def _cut(reader: Reader, spans: list[Span], processes: Processes) -> list[Piece]:
    """All documents, in the order of the batch, cut as evenly as whole blocks and short documents allow. (Dropout of
    probabilities, which those have, is not for shared ones.)"""
    spans = sorted(spans, key=lambda span: (span.row, span.first))
    counts = [count_blocks(span.length, reader.config.block_size) for span in spans]
    firsts = np.cumsum([0, *counts]).tolist()
    longest_whole = reader.sparsity.full_attention_length
    runs = (
        range(first, first + 1 if span.length <= longest_whole else last)
        for span, (first, last) in zip(spans, pairwise(firsts), strict=True)
    )
    places = np.array([*chain(*runs), firsts[-1]])
    even = Shards.even(firsts[-1], processes)
    bounds = tuple(int(places[np.abs(places - bound).argmin()]) for bound in even.bounds)
    shards = Shards(bounds, processes.rank)
    return [Piece(*piece) for piece in zip(spans, map(shards.of_document, firsts, counts), strict=True)]


def _shared_part(reader: Reader, piece: Piece, processes: Processes, choice: Choice | None, start: int) -> SharedPart:
    """A document that processes share, of which this one has what begins at `start`."""
    config, (span, shards) = reader.config, piece
    is_sparse, num_extra = span.num_blocks is not None, config.num_extra_global_tokens
    length = shards.bounds[-1] * config.block_size
    packing, device = pack([span._replace(size=length)], reader), reader.tokens.device
    global_mask, key_mask = None, None
    if is_sparse and reader.global_mask is not None:
        global_mask = (reader.global_mask.flatten()[packing.sources] & packing.is_real)[None]
    if not packing.is_real.all():
        key_mask = to_device(nn.functional.pad(packing.is_real[None], (0, num_extra), value=True), device)
    return SharedPart(
        start,
        len(shards.own) * config.block_size,
        documents=1,
        processes=processes,
        shards=shards,
        block_size=config.block_size,
        sparsity=reader.sparsity if is_sparse else None,
        is_causal=config.is_decoder,
        engine=None if choice is None else choice.engine,
        key_mask=key_mask,
        global_tokens=find_global_tokens(global_mask, num_extra, 1, length, device),
    )


def _owners(pieces: list[Piece], reader: Reader) -> Tensor:
    """`int64`, `[batch, length]`: the process that computes each token, -1 where the states are not returned."""
    tokens, block_size = reader.tokens, reader.config.block_size
    owners = torch.full((tokens.batch, tokens.length), -1)
    for piece in pieces:
        for rank in range(piece.shards.size):
            part = piece.of(rank, block_size)
            owners.view(-1)[part.sources(tokens.length)] = rank
    return owners if reader.computed is None else owners.masked_fill(~reader.computed.cpu(), -1)


def _columns(owners: Tensor, packing: Packing, processes: Processes, device: torch.device) -> Columns:
    """As evenly cut as can be."""
    (_, length), rank = owners.shape, processes.rank
    bounds = [length * index // processes.size for index in range(processes.size + 1)]
    runs = [slice(*pair) for pair in pairwise(bounds)]
    places = torch.zeros_like(owners)
    places.view(-1)[packing.sources[packing.kept]] = packing.kept
    sent = [places[:, run][owners[:, run] == rank] for run in runs]
    own = owners[:, runs[rank]].flatten()
    received = [(own == other).nonzero().flatten() for other in range(processes.size)]
    return Columns(
        bounds,
        computed=to_device(torch.cat(sent), device),
        sent=[len(tokens) for tokens in sent],
        received=[len(tokens) for tokens in received],
        places=to_device(torch.cat(received), device),
    )
