"""The plan of a call whose documents several processes share."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from . import masks
from .common import count_blocks, cut, is_tracing, pad_to_blocks
from .context_parallel import Reading, Shards, attend
from .global_tokens import GlobalTokens, find_global_tokens
from .parts import DecoderPart, FullPart, SparsePart, Tokens
from .pattern import BlockPattern, Sparsity
from .plan import Plan, make_plan
from .processes import Processes


@dataclass(frozen=True, kw_only=True)
class SharedPlan(Plan):
    """What layers get are the tokens of this process, filled up to whole blocks, and behind them the extra ones: those
    of all processes are alike as they enter, and those of the last one count.

    reading: who holds what, and who reads whom, but for the pattern of a layer.
    sparsity: what patterns are made of; None if documents are read in full.
    is_causal: whether it is a decoder's.
    """

    reading: Reading
    sparsity: Sparsity | None
    is_causal: bool

    @property
    def own(self) -> slice:
        """The tokens of this process."""
        blocks = self.reading.shards.own
        first, last = (min(block * self.block_size, self.length) for block in (blocks.start, blocks.stop))
        return slice(first, last)

    def own_tokens(self, *tensors):
        return tuple(None if tensor is None else tensor[:, self.own] for tensor in tensors)

    def enter(self, states: Tensor) -> Tensor:
        return pad_to_blocks(states, self.block_size, dim=1)

    def leave(self, states: Tensor) -> Tensor:
        states = cut(states, self.own.stop - self.own.start, 1)
        return states if self.computed is None else states.masked_fill(~self.computed[:, self.own, None], 0)

    def first_states(self, states: Tensor) -> Tensor:
        return self.reading.processes.share_first(states.transpose(0, 1)).transpose(0, 1)

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, output_attentions: bool = False):
        if output_attentions:
            raise ValueError("output_attentions=True is not for context_parallel: no process has all probabilities.")
        if self.sparsity is None and module.dropout_prob:
            raise ValueError(
                f"attention_probs_dropout_prob ({module.dropout_prob}) has an effect where attention is full, as it "
                "is for inputs so short, but not within context_parallel: set it to 0 for training."
            )
        reading = self.reading._replace(pattern=self._pattern(module))
        return attend(query, key, value, reading, scaling=module.scaling), None

    def _pattern(self, module) -> BlockPattern:
        num_blocks = self.reading.shards.bounds[-1]
        if self.sparsity is None:
            pattern = self.reading.pattern
        elif self.is_causal:
            pattern = self.sparsity.causal_pattern(num_blocks, layer_idx=module.layer_idx)
        else:
            pattern = self.sparsity.pattern(num_blocks, layer_idx=module.layer_idx, training=module.training)
        return pattern.for_heads(module.heads)

    @property
    def can_stream(self) -> bool:
        return False


@lru_cache(maxsize=256)
def _full_pattern(num_blocks: int, block_size: int, is_causal: bool) -> BlockPattern:
    """All blocks read everything."""
    pattern = BlockPattern(num_blocks=num_blocks, block_size=block_size, window=1, num_leading=num_blocks)
    return replace(pattern, num_full=num_blocks, is_causal=True) if is_causal else pattern


def share_plan(config, attention_type: str, tokens: Tokens, processes: Processes, *, keeps: str) -> SharedPlan:
    """The plan of a call that processes share, see `make_plan`.

    Raises:
        ValueError: for what they cannot share.
    """
    _refuse(config, tokens)
    plan = make_plan(config, attention_type, tokens, keeps=keeps, packs=False)
    part, block_size = plan.parts[0], config.block_size
    num_blocks = count_blocks(tokens.length, block_size)
    if isinstance(part, DecoderPart) and part.piece.offset is not None:
        raise ValueError(
            "attention_mask begins with zeros, from behind which a decoder counts its blocks, and context_parallel "
            "cannot share them out then. Pad on the right."
        )
    key_mask, global_tokens = _masks(part, plan, tokens, num_blocks * block_size)
    reading = Reading(
        processes=processes,
        shards=Shards.even(num_blocks, processes),
        pattern=_full_pattern(num_blocks, block_size, config.is_decoder),
        engine=None if plan.choice is None else plan.choice.engine,
        key_mask=key_mask,
        global_tokens=global_tokens,
    )
    return SharedPlan(
        **{**vars(plan), "block_size": block_size},
        reading=reading,
        sparsity=None if isinstance(part, FullPart) else part.sparsity,
        is_causal=config.is_decoder,
    )


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


def _refuse(config, tokens: Tokens) -> None:
    if is_tracing():
        raise ValueError("context_parallel cannot be part of a graph: leave out torch.compile and torch.export.")
    if tokens.has_cache:
        raise ValueError("past_key_values and use_cache are not for context_parallel, which shares whole documents.")
    if tokens.has_documents:
        raise ValueError(
            "position_ids (or cu_seq_lens_q, seq_idx) tell of several documents in a row, which context_parallel does "
            "not share out. Give each document a row of its own, or whole documents to each process."
        )
    mask = tokens.attention_mask
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask must have the shape [batch, length] within context_parallel, but has {list(mask.shape)}."
        )
    if config.pattern_per_document and mask is not None and not mask.all():
        raise ValueError(
            "pattern_per_document (True) and an attention_mask with zeros cannot be shared within context_parallel. "
            "Pass a batch of one document without padding."
        )
