"""The plan of a call whose documents several processes share: a batch as it came, of which each process computes some
columns, or documents that are read as they are alone, see `shared_documents`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import masks
from .common import count_blocks, cut, is_tracing, pad_to_blocks
from .context_parallel import Shards
from .global_tokens import GlobalTokens, find_global_tokens
from .parts import DecoderPart, FullPart, SharedPart, SparsePart, Tokens
from .plan import Plan, Reader, Span, find_documents, padded_plan
from .processes import Processes
from .shared_documents import share_documents


@dataclass(frozen=True, kw_only=True)
class SharedPlan(Plan):
    """What layers get are the tokens of this process, of one run of columns, filled up to whole blocks.

    processes, shards: who holds what.
    """

    processes: Processes
    shards: Shards

    @property
    def own(self) -> slice:
        """The tokens of this process."""
        blocks = self.shards.own
        first, last = (min(block * self.block_size, self.length) for block in (blocks.start, blocks.stop))
        return slice(first, last)

    def own_tokens(self, *tensors):
        return tuple(None if tensor is None else tensor[:, self.own] for tensor in tensors)

    def enter(self, states: Tensor) -> Tensor:
        return pad_to_blocks(states, self.block_size, dim=1)

    def leave(self, states: Tensor) -> Tensor:
        states = cut(states, self.own.stop - self.own.start, 1)
        return states if self.computed is None else states.masked_fill(~self.computed[:, self.own, None], 0)

    def first_states(self, states, attention_mask, config, position_ids):
        return self.processes.share_first(states.transpose(0, 1))[0]

    @property
    def can_stream(self) -> bool:
        return False


def share_plan(config, attention_type: str, tokens: Tokens, processes: Processes, *, keeps_all: bool) -> Plan:
    """The plan of a call that processes share, see `plan.make_plan`.

    Raises:
        ValueError: for what they cannot share.
    """
    _refuse(tokens)
    reader = Reader.of(config, attention_type, tokens, keeps_all)
    spans = find_documents(reader)
    if spans:
        return share_documents(reader, spans, processes, per_document=True)
    plan, tokens = padded_plan(reader), reader.tokens
    part, mask = plan.parts[0], tokens.attention_mask
    if mask is not None and isinstance(part, DecoderPart) and part.piece.offset is not None:
        real = (mask != 0).cpu() if reader.real is None else reader.real
        spans = _turned_rows(real, config.block_size)
        return share_documents(reader._replace(real=real), spans, processes, per_document=False)
    num_blocks = count_blocks(tokens.length, config.block_size)
    shards = Shards.even(num_blocks, processes)
    key_mask, global_tokens = _masks(part, plan, tokens, num_blocks * config.block_size)
    shared = SharedPart(
        processes=processes,
        shards=shards,
        block_size=config.block_size,
        sparsity=None if isinstance(part, FullPart) else reader.sparsity,
        is_causal=config.is_decoder,
        engine=None if plan.choice is None else plan.choice.engine,
        key_mask=key_mask,
        global_tokens=global_tokens,
    )
    fields = {**vars(plan), "parts": (shared,), "block_size": config.block_size}
    return SharedPlan(**fields, processes=processes, shards=shards)


def _turned_rows(real: Tensor, block_size: int) -> list[Span]:
    """The rows of a decoder's batch, of which `real`, `bool`, `[batch, length]`, are no padding: each from its first
    real token on, from which its blocks are counted, with its left padding at the end, where no token reads it."""
    length, firsts = real.shape[1], real.int().argmax(dim=1).tolist()
    num_blocks = count_blocks(length, block_size)
    return [Span(row, first, length, num_blocks * block_size, num_blocks, 0) for row, first in enumerate(firsts)]


def _masks(part, plan: Plan, tokens: Tokens, length: int) -> tuple[Tensor | None, GlobalTokens | None]:
    """The key mask and the global tokens of so many places in whole blocks."""
    if isinstance(part, SparsePart):
        return part.key_mask, part.global_tokens
    if isinstance(part, DecoderPart):
        mask = part.key_mask
        return None if mask is None else nn.functional.pad(mask, (0, length - tokens.length)), None
    mask = masks.padding_mask(tokens.attention_mask, tokens.batch, tokens.length)
    if mask is None and length > tokens.length:
        mask = torch.ones(tokens.batch, tokens.length, dtype=torch.bool, device=tokens.device)
    if mask is not None:
        mask = nn.functional.pad(mask, (0, length - tokens.length))
        mask = nn.functional.pad(mask, (0, plan.num_extra), value=True)
    return mask, find_global_tokens(None, plan.num_extra, tokens.batch, length, tokens.device)


def _refuse(tokens: Tokens) -> None:
    if is_tracing():
        raise ValueError("context_parallel cannot be part of a graph: leave out torch.compile and torch.export.")
    if tokens.has_cache:
        raise ValueError("past_key_values and use_cache are not for context_parallel, which shares whole documents.")
    mask = tokens.attention_mask
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask must have the shape [batch, length] within context_parallel, but has {list(mask.shape)}."
        )
