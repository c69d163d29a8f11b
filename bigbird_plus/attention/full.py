"""Full attention, through the attention functions of transformers."""

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .common import additive_mask, attention_dtype, is_transformed
from .impl import reference
from .masks import FullMask


def function_name(implementation: str, device: torch.device, dropout: float = 0.0) -> str:
    """The attention function, by the name that transformers has for it, that computes full attention under a name."""
    if is_transformed():
        return "eager"
    if implementation == "flex_attention" and (device.type == "cpu" or dropout):
        return "sdpa"  # the other fails there: with masks, gradients or dropout
    return implementation


def attend(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: FullMask,
    *,
    implementation: str,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Full attention.

    Args:
        module: the attention module. Its `is_causal` tells whether a query without a mask reads earlier keys only, its
            `scaling` what scores are multiplied by, its `dropout_prob` the share of probabilities that is dropped.
        query, key, value: `[batch, heads, length, head_dim]`; queries and keys can differ in length.

    Returns:
        The context, `[batch, heads, length, head_dim]`, and the probabilities, `[batch, heads, queries, keys]`, or
        None unless `output_attentions`. Queries that read nothing get the mean of all values, as from a softmax of
        scores that all are the least number.
    """
    name = function_name(implementation, query.device, module.dropout_prob)
    kwargs = {"scaling": module.scaling, "dropout": module.dropout_prob}
    if name == "eager":
        context, probabilities = reference.dense_attention(query, key, value, mask.added, **kwargs)
        return context, probabilities if output_attentions else None
    added, reads_nothing = mask
    if reads_nothing is not None and added is not None:
        added = added.masked_fill(reads_nothing, 0)
    dtype = query.dtype
    query, key, value = (tensor.to(attention_dtype(tensor)) for tensor in (query, key, value))
    if added is not None and added.is_floating_point():
        added = added.to(query.dtype)
    if name == "flex_attention" and added is not None:
        added = added.expand(query.shape[0], -1, query.shape[2], -1)
    context = ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, added, **kwargs)[0].transpose(1, 2)
    if reads_nothing is not None:
        context = torch.where(reads_nothing, _mean_of_values(query, key, value, module.scaling), context)
    if not output_attentions:
        return context.to(dtype), None
    return context.to(dtype), _probabilities(module, query, key, value, mask.added).to(dtype)


def _mean_of_values(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """The context where hiding has made all scores one number, with the gradients that the softmax has there.

    Those functions take `exp(score - log-sum-exp)` for the probability in their backward pass, which is 1 instead of
    `1 / keys` once the least number has swallowed the logarithm. Attention with scores `s = query key^T scaling` is
    `mean(value) + sum(s (value - mean(value))) / keys` up to the first order; its value at 0 and its gradients are
    those wanted.
    """
    mean = value.mean(dim=2, keepdim=True)
    slope = key.transpose(-1, -2) @ (value - mean).detach() * (scaling / key.shape[2])
    first_order = query @ slope
    return mean + (first_order - first_order.detach())


def _probabilities(module, query: Tensor, key: Tensor, value: Tensor, added: Tensor | None) -> Tensor:
    """Those behind a context that a faster function has computed."""
    if added is not None and added.dim() == 2:
        added = additive_mask(added[:, None, None] != 0, torch.float32)
    if module.is_causal and (added is None or added.shape[-2] == 1) and query.shape[2] > 1:
        queries, keys = query.shape[2], key.shape[2]
        earlier = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        causal = additive_mask(earlier, torch.float32)
        added = causal if added is None else torch.minimum(added, causal)
    return reference.dense_attention(query, key, value, added, scaling=module.scaling)[1]
