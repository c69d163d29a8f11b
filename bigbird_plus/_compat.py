"""What differs between the versions of transformers that we support, each told by the feature, not by the number."""

import inspect

import torch
from transformers import Cache, EncoderDecoderCache

_MASK_SIZES_TAKE_POSITIONS = "cache_position" in inspect.signature(Cache.get_mask_sizes).parameters


def cached_key_length(cache, queries: int, cache_position: torch.Tensor) -> int:
    """How many keys the next `queries` tokens will find in a cache, its free places included."""
    cache = _self_attention_cache(cache)
    return cache.get_mask_sizes(cache_position if _MASK_SIZES_TAKE_POSITIONS else queries, 0)[0]


def tokens_in_cache(cache) -> int | torch.Tensor:
    """How many tokens a cache holds; a tensor while a graph with a static cache is traced."""
    if cache is None:
        return 0
    tokens = _self_attention_cache(cache).get_seq_length()
    return tokens if torch.compiler.is_compiling() else int(tokens)


def _self_attention_cache(cache):
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def wants_tuples(config) -> bool:
    """Whether a configuration asks models for tuples; transformers 4 also does so for torchscript."""
    return not config.return_dict or getattr(config, "torchscript", False)
