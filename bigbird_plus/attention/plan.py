"""The plan of a call: which tokens stand where in what the layers compute, and which of them read which.

Everything that a call asks of attention is decided and checked here, once. Layers hand their queries, keys and values
to the plan, and know nothing of it. Two layouts:

* The batch as it came, filled up to whole blocks where attention is sparse.
* Packed: the documents of the batch as one row of real tokens, so that padding costs nothing. A packed document keeps
  the positions and the part of the pattern that it has in the padded tensor; with a pattern of its own it gets those
  that it has alone. Documents that are alike stand next to each other, and are read together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import masks
from .common import chunks, count_blocks, cut, is_tracing, may_read_values, may_wait_for, pad_to_blocks, to_device
from .documents import first_states, first_tokens, same_document_mask
from .engines import Call, Choice, choose_engine, is_engine
from .global_tokens import find_global_tokens
from .masks import FullMask, ScoreShape
from .parts import AnyPart, DecoderPart, Document, FullPart, Part, SparsePart, Tokens, decoder_part, whole_batch
from .pattern import Sparsity
from .rotary import Rotation, make_rotation

if TYPE_CHECKING:
    from ..configuration_big_bird import BigBirdConfig


class Span(NamedTuple):
    """One document of a packed batch.

    row: its row in the padded batch.
    first: place of the first of its tokens there.
    length: how many tokens are taken along, padding between them included.
    size: places taken in the packed row: the length, filled up to whole blocks where attention is sparse.
    num_blocks: blocks of the pattern of which this document reads a part; None if it is read in full.
    first_block: block of that pattern with which the document begins.
    """

    row: int
    first: int
    length: int
    size: int
    num_blocks: int | None
    first_block: int

    @property
    def kind(self) -> tuple[int, int, int]:
        """The same for documents that are alike."""
        return self.num_blocks or 0, self.size, self.first_block

    def sources(self, row_length: int) -> Tensor:
        """`int64`, `[length]`: the places of its tokens in the flattened batch. Behind the end of a row it begins."""
        return (self.first + torch.arange(self.length)) % row_length + self.row * row_length


class Packing(NamedTuple):
    """Where the tokens of a packed batch come from.

    spans: the documents, in the order in which they are packed.
    sources: `int64`, `[packed length]`: of each packed token, its place in the flattened padded batch.
    is_real: `bool`, `[packed length]`, False for padding.
    kept: `int64`: the places in the packed row of what is returned: in encoders of what is no padding.
    """

    spans: tuple[Span, ...]
    sources: Tensor
    is_real: Tensor
    kept: Tensor

    def to_device(self, device: torch.device) -> "Packing":
        """The same of tensors there."""
        return Packing(self.spans, *(to_device(tensor, device) for tensor in self[1:]))


class Row(NamedTuple):
    """A packed row that an engine takes in one go.

    forward: the engine's function, see `triton.forward_documents`.
    part: one of the parts, which have one pattern.
    key_mask: `bool`, `[1, packed length]`, False for padding; None where there is none.
    extents: `int32`, `[documents, 3]`.
    """

    forward: Callable[..., Tensor]
    part: SparsePart
    key_mask: Tensor | None
    extents: Tensor

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The context, see `Plan.attend`."""
        pattern = self.part.whole_pattern(module.layer_idx, module.training).for_heads(module.heads)
        return self.forward(query, key, value, pattern, self.key_mask, self.extents, scaling=module.scaling)


@dataclass(frozen=True)
class Plan:
    """See above.

    parts: what is read together; one if the batch is not packed.
    batch, length: the shape of the input.
    positions: `int64`, `[1 or batch, length]`: of the position embeddings.
    choice: the engine of sparse attention; None if nothing is read sparsely.
    block_size: what the length is filled up to a multiple of.
    num_extra: extra global tokens of each document, which stand behind its tokens, or behind those of a packed row.
    computed: `bool`, `[batch, length]`: whose states are returned, the others being zero; None for all.
    packing: None if the batch is not packed.
    row: the packed row, if the engine takes it in one go.
    rotation: of queries and keys, in the layout of the plan; None for models without rotary positions.
    """

    parts: tuple[AnyPart, ...]
    batch: int
    length: int
    positions: Tensor
    choice: Choice | None = None
    block_size: int = 1
    num_extra: int = 0
    computed: Tensor | None = None
    packing: Packing | None = None
    row: Row | None = None
    rotation: Rotation | None = None

    @property
    def num_documents(self) -> int:
        """How many documents there are, each with extra tokens of its own."""
        return self.batch if self.packing is None else len(self.packing.spans)

    def own_tokens(self, *tensors):
        """Of tensors `[batch or 1, length, ...]` the tokens that are computed here: all."""
        return tensors

    def first_states(self, states: Tensor, attention_mask, config, position_ids) -> Tensor:
        """See `documents.first_states`; of states that have left the plan."""
        return first_states(states, attention_mask, config, position_ids)

    def enter(self, states: Tensor) -> Tensor:
        """What the layers compute, without the extra tokens, of `[batch, length, ...]`."""
        if self.packing is not None:
            return states.flatten(0, 1)[self.packing.sources][None]
        return pad_to_blocks(states, self.block_size, dim=1) if self.block_size > 1 else states

    def rotated(self, config, states: Tensor) -> "Plan":
        """The plan for `states` in its layout, with their rotation if positions are rotary. What is no token of the
        input, extra global tokens included, has position 0, at which nothing is turned."""
        if config.position_embedding_type != "rotary":
            return self
        (positions,) = self.own_tokens(self.positions)
        if self.packing is not None:
            positions = self.enter(positions.expand(self.batch, -1))
        positions = nn.functional.pad(positions, (0, states.shape[1] - positions.shape[1]))
        return replace(self, rotation=make_rotation(config, positions))

    def leave(self, states: Tensor) -> Tensor:
        """The reverse, with zeros for what is not computed, and without the extra tokens."""
        if self.packing is not None:
            padded = states.new_zeros(self.batch * self.length, *states.shape[2:])
            kept = self.packing.kept
            padded = padded.index_put((self.packing.sources[kept],), states[0, kept])
            return padded.unflatten(0, (self.batch, self.length))
        states = cut(states, self.length, 1)
        return states if self.computed is None else states.masked_fill(~self.computed[..., None], 0)

    def leave_probabilities(self, probabilities: Tensor) -> Tensor:
        """`[batch, heads, queries, keys]` without the rows and columns of what is no token of the input."""
        if self.packing is None and self.block_size > 1:
            return cut(cut(probabilities, self.length, 2), self.length, 3)
        if self.packing is None and self.num_extra:
            return probabilities[:, :, : self.length, : -self.num_extra]
        return probabilities

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one layer.

        Args:
            module: the attention module: `layer_idx`, `heads`, `scaling`, `dropout_prob`, `is_causal` and `training`
                are asked of it.
            query, key, value: `[batch, heads, length, head_dim]` in the layout of the plan.

        Returns:
            The context, in the shape of `query`, and the probabilities, `[batch, heads, queries, keys]`, or None
            unless `output_attentions`.
        """
        if self.packing is None:
            return self.parts[0].attend(module, query, key, value, output_attentions)
        if self.row is not None and not output_attentions:
            return self.row.attend(module, query, key, value), None
        queries, keys, values = (self._split(tensor) for tensor in (query, key, value))
        results = [
            part.attend(module, own_query, own_key, own_value, output_attentions)
            for part, own_query, own_key, own_value in zip(self.parts, queries, keys, values, strict=True)
        ]
        probabilities = self._probabilities(self.packing.spans, query, results) if output_attentions else None
        return self._join([context for context, _ in results]), probabilities

    def _split(self, row: Tensor) -> Iterator[Tensor]:
        """`[1, heads, packed length and extra tokens, dim]` -> of each part its documents and their extra tokens."""
        first = self.parts[-1].end
        for part in self.parts:
            documents = part.take(row)
            if self.num_extra:
                extra = Part(first, self.num_extra, part.documents)
                documents = torch.cat((documents, extra.take(row)), dim=2)
                first = extra.end
            yield documents

    def _join(self, contexts: list[Tensor]) -> Tensor:
        """The reverse of `_split`."""
        tokens = [context.transpose(1, 2) for context in contexts]
        if self.num_extra:
            places = [tensor[:, : part.size] for part, tensor in zip(self.parts, tokens, strict=True)]
            tokens = [*places, *(tensor[:, part.size :] for part, tensor in zip(self.parts, tokens, strict=True))]
        tokens = [tensor.flatten(0, 1) for tensor in tokens]
        row = torch.cat(tokens) if len(tokens) > 1 else tokens[0]
        return row[None].transpose(1, 2)

    def _probabilities(self, spans: tuple[Span, ...], query: Tensor, results) -> Tensor:
        """Those of the padded batch."""
        found = query.new_zeros(self.batch, query.shape[1], self.length, self.length)
        documents = (document for _, probabilities in results for document in probabilities)
        for span, document in zip(spans, documents, strict=True):
            own = slice(span.first, span.first + span.length)
            found[span.row, :, own, own] = document[:, : span.length, : span.length]
        return found

    # Streaming: some documents after others, see `BigBirdLayer.stream`.

    @property
    def can_stream(self) -> bool:
        """Whether the documents can be read one after another: on a CPU, if they are packed or read sparsely, from
        their start and without global tokens."""
        if self.choice is None:
            return self.packing is not None and self.positions.device.type == "cpu" and not self.num_extra
        from_start = all(getattr(part, "from_start", True) for part in self.parts)
        has_global_tokens = any(getattr(part, "global_tokens", None) is not None for part in self.parts)
        return self.choice.name == "merged" and from_start and not has_global_tokens

    def chunks(self, states: Tensor, size: int) -> Iterator[tuple[Tensor, "Plan"]]:
        """Views of `states`, in the layout of the plan, that hold documents of up to `size` tokens together or a
        longer one, each with the plan of its own."""
        if self.packing is None:
            for some in chunks(0, self.batch, max(1, size // states.shape[1])):
                documents = slice(some.start, some.stop)
                own = (self.parts[0].some(documents),)
                rotation = self.rotation and self.rotation.of_documents(documents)
                yield states[documents], replace(self, parts=own, batch=len(some), rotation=rotation)
            return
        for parts in self._parts_of(size):
            first = parts[0].start
            moved = tuple(replace(part, start=part.start - first) for part in parts)
            places = slice(first, parts[-1].end)
            yield states[:, places], replace(self, parts=moved, rotation=self.rotation and self.rotation.of(places))

    def _parts_of(self, size: int) -> Iterator[list[AnyPart]]:
        """Neighbouring parts, cut where they are too large, of up to `size` tokens together or of one document."""
        gathered: list[AnyPart] = []
        for part in self.parts:
            for some in chunks(0, part.documents, max(1, size // part.size)):
                piece = part.some(slice(some.start, some.stop))
                if gathered and piece.end - gathered[0].start > size:
                    yield gathered
                    gathered = []
                gathered.append(piece)
        yield gathered

    @property
    def has_one_document(self) -> bool:
        """Whether there is one document alone, and it is read sparsely."""
        part = self.parts[0]
        documents = part.documents if self.packing is not None else self.batch
        return len(self.parts) == documents == 1 and not isinstance(part, FullPart)

    def document(self, module: nn.Module) -> Document:
        """How the attention `module` reads the only one, sparsely."""
        return cast(SparsePart | DecoderPart, self.parts[0]).document(module)


# ---------------------------------------------------------------------------------------------------------------------
# Making it
# ---------------------------------------------------------------------------------------------------------------------


class Reader(NamedTuple):
    """The settings of a model, and what the call brings.

    global_mask: `bool`, `[batch, length]`, on the CPU but in graphs: which tokens are global; None for none.
    real: `bool`, `[batch, length]`, on the CPU: which tokens are no padding; None for all, and where that is not to be
        looked at.
    computed: `bool`, `[batch, length]`, there where `real` is: whose states are returned; None for all.
    """

    config: "BigBirdConfig"
    sparsity: Sparsity
    tokens: Tokens
    reads_sparsely: bool
    global_mask: Tensor | None
    real: Tensor | None
    computed: Tensor | None

    @classmethod
    def of(cls, config, attention_type: str, tokens: Tokens, keeps_all: bool = False) -> "Reader":
        """Arguments as those of `make_plan`."""
        tokens, real = _look_at_mask(config, tokens)
        sparsity = Sparsity.from_config(config)
        keys = tokens.length if tokens.keys is None else tokens.keys
        reads_sparsely = is_sparse(sparsity, attention_type, keys) and (config.is_decoder or not tokens.has_cache)
        global_mask = _chosen_tokens(config, tokens, real, reads_sparsely)
        computed = None if keeps_all else _computed(config, tokens, real)
        return cls(config, sparsity, tokens, reads_sparsely, global_mask, real, computed)

    @property
    def implementation(self) -> str:
        """The name of the attention function for what is read in full."""
        return full_implementation(self.config)

    def full_mask(self, attention_mask, query_positions: Tensor, *, batch: int, keys: int, past=0) -> FullMask:
        """See `masks.full_attention_mask`."""
        return masks.full_attention_mask(
            attention_mask,
            ScoreShape(batch, self.config.num_attention_heads, query_positions.shape[0], keys),
            query_positions=query_positions,
            past=past,
            is_causal=self.config.is_decoder,
            dtype=self.tokens.dtype,
            implementation=self.implementation,
        )

    def choose_engine(self, has_global_tokens: bool) -> Choice:
        """The engine for what is read sparsely."""
        config, tokens = self.config, self.tokens
        call = Call(
            device=tokens.device,
            dtype=tokens.dtype,
            head_dim=config.hidden_size // config.num_attention_heads,
            block_size=config.block_size,
            is_causal=config.is_decoder,
            has_global_tokens=has_global_tokens,
            needs_gradients=torch.is_grad_enabled(),
        )
        return choose_engine(config._attn_implementation, call)


def full_implementation(config) -> str:
    """The name of the attention function for what is read in full."""
    name = config._attn_implementation
    return "sdpa" if is_engine(name) else name


def is_sparse(sparsity: Sparsity, attention_type: str, keys: int) -> bool:
    """Whether so many keys are read sparsely: if there are more than the pattern lets a token read anyway. (A
    decoder's first tokens read in full all the same.)"""
    return attention_type == "block_sparse" and keys > sparsity.full_attention_length


def make_plan(config, attention_type: str, tokens: Tokens, *, keeps_all: bool = False) -> Plan:
    """The plan of a call.

    Args:
        config: a `BigBirdConfig`.
        attention_type: `"block_sparse"` or `"original_full"`.
        tokens: what the call brings.
        keeps_all: whether the states of all places are wanted, and not of real tokens and of `tokens.wanted` alone.
            Decoders and eager attention compute all, in any case.

    Raises:
        ValueError: if there are more tokens than positions, or if a mask does not fit the input or the model.
    """
    reader = Reader.of(config, attention_type, tokens, keeps_all)
    spans, per_document = _find_documents(reader)
    return _packed_plan(reader, spans, per_document) if spans else padded_plan(reader)


def padded_plan(reader: Reader) -> Plan:
    """The plan of a batch as it came."""
    config, tokens = reader.config, reader.tokens
    check_length(config, tokens, tokens.length)
    shape = {"batch": tokens.batch, "length": tokens.length, "num_extra": config.num_extra_global_tokens}
    shape["positions"] = tokens.cache_position[None] if tokens.position_ids is None else tokens.position_ids
    computed = None if reader.computed is None else to_device(reader.computed, tokens.device)
    if not reader.reads_sparsely:
        full = FullPart(mask=_full_mask(reader), implementation=reader.implementation)
        return Plan((full,), **shape, computed=computed)
    if config.is_decoder:
        choice = reader.choose_engine(has_global_tokens=False)
        return Plan((decoder_part(reader.sparsity, tokens, choice, reader.real),), **shape, choice=choice)
    part = _sparse_part(reader)
    return Plan((part,), **shape, choice=part.choice, block_size=config.block_size, computed=computed)


def _look_at_mask(config, tokens: Tokens) -> tuple[Tokens, Tensor | None]:
    """The only look at the values of a mask, for which a GPU is waited for once a call: `Reader.real`, and the tokens
    without a mask if it hides nothing, else with `wanted` on the CPU. Tokenizers give such masks always, and without
    them no kernel reads masks, full attention needs none, and nothing is moved in a decoder. Not for what goes on
    where a cache ends: a step is short.
    """
    mask, is_start = tokens.attention_mask, isinstance(tokens.past, int) and tokens.past == 0
    if mask is None or mask.dim() != 2 or not is_start or not may_wait_for(mask):
        return tokens, None
    goes_on = config.is_decoder and mask.shape[1] > tokens.length
    if mask.shape[0] != tokens.batch or (mask.shape[1] != tokens.length and not goes_on):
        return tokens, None  # an error for others to raise
    real, wanted = mask[:, : tokens.length] != 0, tokens.wanted
    if wanted is None:
        real = real.cpu()
    else:
        real, wanted = torch.stack((real, wanted.to(mask.device).expand_as(real))).cpu()
    return (tokens._replace(attention_mask=None), None) if real.all() else (tokens._replace(wanted=wanted), real)


def _chosen_tokens(config, tokens: Tokens, real: Tensor | None, reads_sparsely: bool) -> Tensor | None:
    """`Reader.global_mask`, for which a GPU is waited for, too: how many there are decides on shapes."""
    if tokens.global_attention_mask is not None and config.is_decoder:
        raise ValueError(
            "global_attention_mask is for encoders: in a decoder (is_decoder=True) a token that is read by all would "
            "be read by earlier ones. Leave it out."
        )
    chosen = masks.as_global_mask(tokens.global_attention_mask, tokens.batch, tokens.length)
    if chosen is None or not reads_sparsely:
        return None
    if is_tracing():
        return chosen
    return chosen.cpu() if real is None else chosen.cpu() & real


def check_length(config, tokens: Tokens, length: int) -> None:
    """Raises a `ValueError` if so many tokens of a document need more positions than there are."""
    most, past = config.longest_input, tokens.past
    if most is None:
        return
    if tokens.position_ids is None:
        needed = past + length if isinstance(past, int) else 0
    else:
        needed = int(tokens.position_ids.max()) + 1 if may_read_values(tokens.position_ids) else 0
    if needed > most:
        what = "The input has {} tokens" if tokens.position_ids is None else "position_ids ask for {} positions"
        raise ValueError(
            f"{what.format(needed)}, but max_position_embeddings is {most}. Cut the input (truncation=True in the "
            "tokenizer), use a model with more positions, or set config.tiled_positions."
        )


def _computed(config, tokens: Tokens, real: Tensor | None) -> Tensor | None:
    """`Reader.computed`."""
    keeps_all = config._attn_implementation == "eager" and not config.pattern_per_document
    if keeps_all or config.is_decoder or tokens.has_cache:
        return None
    if tokens.attention_mask is None or tokens.attention_mask.dim() != 2:
        return None
    if real is None:
        real = masks.padding_mask(tokens.attention_mask, tokens.batch, tokens.length)
    if real is None or config.pattern_per_document or tokens.wanted is None:
        return real
    return real | tokens.wanted.to(real.device)


def _full_mask(reader: Reader) -> FullMask:
    """The mask of a batch that is read in full as it came."""
    tokens, num_extra = reader.tokens, reader.config.num_extra_global_tokens
    attention_mask, keys = tokens.attention_mask, tokens.length if tokens.keys is None else tokens.keys
    if is_tracing() and not tokens.has_cache and attention_mask is None and tokens.position_ids is not None:
        attention_mask = same_document_mask(tokens.position_ids.expand(tokens.batch, -1))
    places = tokens.cache_position
    if num_extra:
        attention_mask = masks.with_extra_tokens(attention_mask, num_extra)
        places = torch.arange(tokens.length + num_extra, device=tokens.device)
    return reader.full_mask(attention_mask, places, batch=tokens.batch, keys=keys + num_extra, past=tokens.past)


def _sparse_part(reader: Reader) -> SparsePart:
    """A batch that is read sparsely as it came."""
    config, sparsity, tokens, global_mask = reader.config, reader.sparsity, reader.tokens, reader.global_mask
    if tokens.attention_mask is not None and tokens.attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has the shape {list(tokens.attention_mask.shape)}, but block-sparse attention takes "
            f"[batch, length]. Masks of more dimensions need attention_type='original_full'."
        )
    mask = masks.padding_mask(tokens.attention_mask, tokens.batch, tokens.length)
    if global_mask is not None and mask is not None and reader.real is None:
        global_mask = global_mask & mask.to(global_mask.device)
    num_extra = config.num_extra_global_tokens
    return whole_batch(sparsity, mask, tokens, reader.choose_engine, global_mask=global_mask, num_extra=num_extra)


# ---------------------------------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------------------------------


def find_documents(reader: Reader) -> list[Span]:
    """The documents that are read as they are alone; none if there are no others than those of the padded batch."""
    spans, per_document = _find_documents(reader)
    return spans if per_document else []


def _find_documents(reader: Reader) -> tuple[list[Span], bool]:
    """The documents to pack, none if packing would save nothing and change nothing; and whether each is read as it is
    alone: counted from its first real token, with a pattern of its own, or in full where it is short enough."""
    config, tokens, sparsity = reader.config, reader.tokens, reader.sparsity
    if is_tracing() or tokens.has_cache:
        return [], False
    if tokens.has_documents and tokens.position_ids is not None:
        documents = _documents_of_positions(tokens.position_ids, tokens.batch, tokens.length)
        return _spans(reader, documents, own_patterns=True), True
    real, computed = reader.real, reader.computed
    if real is None or computed is None or (computed & ~real).any():
        return [], False
    per_document = config.pattern_per_document
    documents = [(row, *_extent(places)) for row, places in enumerate(real.unbind()) if places.any()]
    spans = _spans(reader, documents, own_patterns=per_document)
    block_size = sparsity.block_size if reader.reads_sparsely else 1
    padded = tokens.batch * count_blocks(tokens.length, block_size) * block_size
    if not per_document and sum(span.size for span in spans) >= padded:
        return [], False
    return spans, per_document


def _extent(real: Tensor) -> tuple[int, int]:
    """The first place, and the one behind the last, that is True in a row."""
    places = real.nonzero().flatten()
    return int(places[0]), int(places[-1]) + 1


def _documents_of_positions(position_ids: Tensor, batch: int, length: int) -> list[tuple[int, int, int]]:
    """Of each document its row, its first place and the one behind its last."""
    firsts = zip(*(tensor.tolist() for tensor in first_tokens(position_ids, batch)), strict=True)
    ends = [*firsts, (batch, 0)]
    return [(row, first, end if next_row == row else length) for (row, first), (next_row, end) in pairwise(ends)]


def _spans(reader: Reader, documents: list[tuple[int, int, int]], own_patterns: bool) -> list[Span]:
    """Those of documents, as `_documents_of_positions` gives them, like ones next to each other."""
    sparsity, length = reader.sparsity, reader.tokens.length
    block_size = sparsity.block_size
    spans = []
    for row, first, end in documents:
        sparse, num_blocks, first_block = reader.reads_sparsely, count_blocks(length, block_size), 0
        if own_patterns:
            sparse, num_blocks = (
                sparse and end - first > sparsity.full_attention_length,
                count_blocks(end - first, block_size),
            )
        elif sparse:
            first_block = first // block_size
            first, end = first_block * block_size, min(count_blocks(end, block_size) * block_size, length)
        size = count_blocks(end - first, block_size) * block_size if sparse else end - first
        spans.append(Span(row, first, end - first, size, num_blocks if sparse else None, first_block))
    return sorted(spans, key=lambda span: span.kind)


def _packed_plan(reader: Reader, spans: list[Span], per_document: bool) -> Plan:
    tokens, num_extra = reader.tokens, reader.config.num_extra_global_tokens
    check_length(reader.config, tokens, max(span.length for span in spans) if per_document else tokens.length)
    packing, choice = pack(spans, reader), choose_for_documents(reader, spans)
    parts = packed_parts(reader, packing, spans, choice)
    return Plan(
        tuple(parts),
        batch=tokens.batch,
        length=tokens.length,
        positions=positions_of(reader, spans, per_document),
        choice=choice,
        num_extra=num_extra,
        packing=packing.to_device(tokens.device),
        row=_row(spans, parts, packing.is_real, tokens.device),
    )


def choose_for_documents(reader: Reader, spans: list[Span]) -> Choice | None:
    """The engine for what is read sparsely; None if nothing is."""
    is_chosen = reader.global_mask is not None and bool(reader.global_mask.any())
    is_sparse_anywhere = any(span.num_blocks is not None for span in spans)
    has_global_tokens = is_chosen or reader.config.num_extra_global_tokens > 0
    return reader.choose_engine(has_global_tokens) if is_sparse_anywhere else None


def packed_parts(reader: Reader, packing: Packing, spans: list[Span], choice: Choice | None) -> list[AnyPart]:
    """What is read together of the last documents of `packing`, on the CPU, `spans`: documents that are alike."""
    global_mask = None
    if reader.global_mask is not None:
        global_mask = reader.global_mask.flatten()[packing.sources] & packing.is_real
    parts: list[AnyPart] = []
    start = len(packing.sources) - sum(span.size for span in spans)
    for _, alike in groupby(spans, key=lambda span: span.kind):
        group = list(alike)
        where = Part(start, group[0].size, len(group))
        parts.append(_packed_part(reader, group, where, packing.is_real, global_mask, choice))
        start = parts[-1].end
    return parts


def pack(spans: list[Span], reader: Reader) -> Packing:
    """Where the tokens of the spans come from, on the CPU."""
    total = sum(span.size for span in spans)
    sources, is_real = torch.zeros(total, dtype=torch.int64), torch.zeros(total, dtype=torch.bool)
    start = 0
    for span in spans:
        taken = slice(start, start + span.length)
        sources[taken] = span.sources(reader.tokens.length)
        is_real[taken] = True
        start += span.size
    is_kept = is_real
    if reader.computed is not None:
        is_kept = is_kept & reader.computed.cpu().flatten()[sources]
    if reader.real is not None:
        is_real = is_real & reader.real.flatten()[sources]
    return Packing(tuple(spans), sources, is_real, is_kept.nonzero().flatten())


def positions_of(reader: Reader, spans: list[Span], per_document: bool) -> Tensor:
    """Of the position embeddings, `[1 or batch, length]`."""
    tokens, config = reader.tokens, reader.config
    if tokens.position_ids is not None:
        return tokens.position_ids
    positions = torch.arange(tokens.length, device=tokens.device)[None]
    if not per_document:
        return positions
    first = torch.zeros(tokens.batch, 1, dtype=torch.int64)
    for span in spans:
        first[span.row] = span.first
    last = None if config.longest_input is None else config.longest_input - 1
    return (positions - to_device(first, tokens.device)).clamp(0, last)  # padding gets any


def _packed_part(
    reader: Reader, spans: list[Span], place: Part, is_real, global_mask, choice
) -> FullPart | SparsePart:
    """The part of documents that are alike."""
    config, num_extra, tokens = reader.config, reader.config.num_extra_global_tokens, reader.tokens
    span, where = spans[0], {"start": place.start, "size": place.size, "documents": place.documents}
    key_mask = is_real[place.start : place.end].view(place.documents, place.size)
    key_mask = None if key_mask.all() else nn.functional.pad(key_mask, (0, num_extra), value=True)
    if key_mask is not None:
        key_mask = to_device(key_mask, tokens.device)
    if span.num_blocks is None:
        places = torch.arange(place.size + num_extra, device=tokens.device)
        mask = reader.full_mask(key_mask, places, batch=place.documents, keys=len(places))
        return FullPart(**where, mask=mask, implementation=reader.implementation)
    if global_mask is not None:
        global_mask = global_mask[place.start : place.end].view(place.documents, place.size)
    return SparsePart(
        **where,
        sparsity=reader.sparsity,
        choice=choice,
        num_blocks=span.num_blocks,
        first_block=span.first_block,
        is_causal=config.is_decoder,
        key_mask=key_mask,
        global_tokens=find_global_tokens(global_mask, num_extra, place.documents, place.size, tokens.device),
    )


def _row(spans: list[Span], parts: Sequence[AnyPart], is_real: Tensor, device: torch.device) -> Row | None:
    """What an engine takes in one go, if it does, and if the documents have one pattern and no global tokens."""
    part = parts[0]
    if len({span.num_blocks for span in spans}) > 1 or not isinstance(part, SparsePart):
        return None
    if any(getattr(part, "global_tokens", None) is not None for part in parts):
        return None
    forward, block_size = getattr(part.choice.engine, "forward_documents", None), part.sparsity.block_size
    if forward is None:
        return None
    extents, start = [], 0
    for span in spans:
        end_block = span.first_block + span.size // block_size
        extents.append((start - span.first_block * block_size, span.first_block, end_block))
        start += span.size
    is_padded = any(getattr(part, "key_mask", None) is not None for part in parts)
    table = to_device(torch.tensor(extents, dtype=torch.int32), device)
    return Row(forward, part, to_device(is_real[None], device) if is_padded else None, table)
