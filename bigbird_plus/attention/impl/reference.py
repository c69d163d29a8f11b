"""The definition of BigBird's attention: every score is computed, and the probabilities are at hand.

Quadratic in the length. All faster engines are tested against this one.
"""

import torch
from torch import Tensor, nn

from ..common import additive_mask, score_dtype
from ..global_tokens import GlobalTokens
from ..pattern import BlockPattern


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`softmax(query key^T scaling + bias) value`.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, heads, keys, head_dim]`.
        bias: what is added to the scores, broadcastable to `[batch, heads, queries, keys]`.
        scaling: what the scores are multiplied by.
        dropout: share of the probabilities that is dropped.

    Returns:
        The context, `[batch, heads, queries, head_dim]`, and the probabilities, `[batch, heads, queries, keys]`.
    """
    probabilities = _probabilities(query, key, bias, scaling)
    if dropout:
        probabilities = nn.functional.dropout(probabilities, dropout)
    return torch.matmul(probabilities, value), probabilities


def _probabilities(query, key, bias, scaling):
    scores = torch.matmul(query, key.transpose(-1, -2)).to(score_dtype(query)) * scaling
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1).to(query.dtype)


def reason(call) -> str | None:
    """Why it cannot run a call: never."""
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    key_mask: Tensor | None = None,
    global_tokens: GlobalTokens | None = None,
    *,
    scaling: float,
) -> Tensor:
    """The context that `attention` gives."""
    return attention(query, key, value, pattern, key_mask, global_tokens, scaling=scaling)[0]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    key_mask: Tensor | None = None,
    global_tokens: GlobalTokens | None = None,
    *,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention` or, with a decoder's pattern, `causal_attention` of documents that begin at the first
    place."""
    if not pattern.is_causal:
        return block_sparse_attention(query, key, value, pattern, key_mask, global_tokens, scaling=scaling)
    places = torch.arange(query.shape[2], device=query.device)
    return causal_attention(query, key, value, pattern, places=places, offset=None, key_mask=key_mask, scaling=scaling)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    key_mask: Tensor | None,
    global_tokens: GlobalTokens | None = None,
    *,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention in which block i reads block j `pattern.counts[:, i, j]` times.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`: the tokens of `pattern.num_blocks` blocks, then the
            extra global ones.
        pattern: who reads whom.
        global_tokens: tokens that read everything and are read by all besides.
        key_mask: `bool`, `[batch, length]`, False where a token is padding. Padding is not read, and what it reads is
            zero: context and probabilities.
        scaling: what the scores are multiplied by.

    Returns:
        The context, `[batch, heads, length, head_dim]`, and the probabilities, `[batch, heads, length, length]`.
    """
    bias = _expand(pattern, query, 0 if global_tokens is None else global_tokens.num_extra)
    if global_tokens is not None:
        is_global = global_tokens.mask(query.shape[2])[:, None]
        bias = torch.where(is_global[:, :, None], bias.clamp(min=0), bias)
        bias = bias.masked_fill(is_global[..., None], 0)
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask[:, None, None], torch.finfo(bias.dtype).min)
    probabilities = _probabilities(query, key, bias, scaling)
    if key_mask is not None:
        probabilities = probabilities.masked_fill(~key_mask[:, None, :, None], 0)
    return torch.matmul(probabilities, value), probabilities


def _expand(pattern: BlockPattern, like: Tensor, num_extra: int) -> Tensor:
    """The logarithm of the counts, token by token, `[1, heads or 1, length, length]`; nothing reads the extra tokens,
    and they read nothing."""
    dtype = score_dtype(like)
    least = torch.finfo(dtype).min
    block_size = pattern.block_size
    log_counts = torch.from_numpy(pattern.counts).to(like.device, dtype).log().clamp(min=least)
    log_counts = log_counts.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)[None]
    return nn.functional.pad(log_counts, (0, num_extra, 0, num_extra), value=least)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    places: Tensor,
    offset: Tensor | None,
    key_mask: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention of a decoder's tokens to those before them, from the blocks that `pattern.counts` names.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, heads, keys, head_dim]`, those of earlier calls included.
        pattern: which block reads which.
        places: `int64`, `[queries]`: places of the queries among the keys.
        offset: `int64`, `[batch]`: place of the first real token of each sequence; None where it is 0 throughout.
        key_mask: `bool`, `[batch, keys]`, False where a token is padding; None where none behind the first real token
            is. Padding is not read, and what it reads is zero: context and probabilities.
        scaling: what the scores are multiplied by.

    Returns:
        The context, `[batch, heads, queries, head_dim]`, and the probabilities, `[batch, heads, queries, keys]`.
    """
    start = 0 if offset is None else offset[:, None]
    query_places = places[None] - start
    key_places = torch.arange(key.shape[2], device=key.device)[None] - start
    query_block, key_block = (
        (tensor // pattern.block_size).clamp(0, pattern.num_blocks - 1) for tensor in (query_places, key_places)
    )
    counts = torch.from_numpy(pattern.counts).to(key.device)
    reads = counts[:, query_block[:, :, None], key_block[:, None]].transpose(0, 1) > 0
    reads = reads & ((key_places[:, None] <= query_places[:, :, None]) & (key_places[:, None] >= 0))[:, None]
    is_real = query_places >= 0
    if key_mask is not None:
        reads, is_real = reads & key_mask[:, None, None], is_real & key_mask[:, places]
    probabilities = _probabilities(query, key, additive_mask(reads, score_dtype(query)), scaling)
    probabilities = probabilities.masked_fill(~is_real[:, None, :, None], 0)
    return torch.matmul(probabilities, value), probabilities
