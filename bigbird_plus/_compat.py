"""What differs between the versions of transformers that we support, each told by the feature, not by the number."""

import importlib
import inspect
import logging
import warnings
from contextlib import contextmanager

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


@contextmanager
def _without_messages_of_torchao():
    """Keeps torchao quiet while it is imported: it tells of libraries for other machines, and of its own code."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r".*\btorchao\b")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


with _without_messages_of_torchao():
    importlib.import_module("transformers.modeling_utils")  # imports torchao, where that is installed

_MASK_SIZES_TAKE_POSITIONS = "cache_position" in inspect.signature(Cache.get_mask_sizes).parameters

CACHE = "cache" if "cache" in BaseModelOutputWithPastAndCrossAttentions.__dataclass_fields__ else "past_key_values"
"""What outputs and `generate` call the cache. Models take it under either name."""


def cached_key_length(cache, queries: int, cache_position: torch.Tensor) -> int:
    """How many keys the next `queries` tokens will find in a cache, its free places included."""
    cache = _self_attention_cache(cache)
    return cache.get_mask_sizes(cache_position if _MASK_SIZES_TAKE_POSITIONS else queries, 0)[0]


def tokens_in_cache(cache, cache_position: torch.Tensor | None = None) -> int | torch.Tensor:
    """How many tokens a cache holds; a tensor while a graph with a static cache is traced. Some versions count them by
    looking through all keys, so the place of the first new token is asked first, where it is given."""
    if cache is None:
        return 0
    tokens = _self_attention_cache(cache).get_seq_length() if cache_position is None else cache_position[0]
    return tokens if torch.compiler.is_compiling() else int(tokens)


def keep_in_cache(cache, cache_idx: int, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Makes keys and values, `[batch, heads, tokens, head_dim]`, those of an empty layer of a plain `DynamicCache`,
    whose `update` would copy them. False where the cache is another one, or not empty there."""
    cache = _self_attention_cache(cache)
    if type(cache) is not DynamicCache or cache.get_seq_length(cache_idx):
        return False
    cache.update(key[:, :, :0], value[:, :, :0], cache_idx)  # makes the layer
    layer = cache.layers[cache_idx]
    if type(layer) is not DynamicLayer:
        return False
    layer.keys, layer.values = key, value
    return True


def cache_of_tuples(past_key_values: tuple | list) -> Cache:
    """The cache that holds what early versions kept in tuples, one a layer: keys and values, perhaps followed by those
    of cross-attention."""
    cache = DynamicCache([layer[:2] for layer in past_key_values])
    if past_key_values and len(past_key_values[0]) == 4:
        return EncoderDecoderCache(cache, DynamicCache([layer[2:] for layer in past_key_values]))
    return cache


def tuples_of_cache(cache: Cache) -> tuple:
    """The reverse of `cache_of_tuples`."""
    caches: tuple[Cache, ...] = (cache,)
    if isinstance(cache, EncoderDecoderCache):
        caches = (cache.self_attention_cache, cache.cross_attention_cache)
    per_layer = zip(*(one.layers for one in caches), strict=True)
    return tuple(sum(((layer.keys, layer.values) for layer in layers), ()) for layers in per_layer)


def _self_attention_cache(cache):
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def wants_tuples(config) -> bool:
    """Whether a configuration asks models for tuples; transformers 4 also does so for torchscript."""
    return not config.return_dict or getattr(config, "torchscript", False)
