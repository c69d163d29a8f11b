"""A cache that is bounded by the memory of what it keeps, and not by how many things that are: training meets some
fifty lengths in each of twelve layers, or one length that fills as much."""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def cached_up_to(most_bytes: int, size: Callable[[Any], int]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """`functools.lru_cache` for results that take up to `most_bytes` together, as `size` tells of each. The latest is
    kept in any case. Safe to use from several threads."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        kept: OrderedDict[tuple, T] = OrderedDict()
        lock, taken = Lock(), 0

        @wraps(function)
        def cached(*args: P.args, **kwargs: P.kwargs) -> T:
            nonlocal taken
            asked = (*args, *kwargs.items())
            with lock:
                if asked in kept:
                    kept.move_to_end(asked)
                    return kept[asked]
            result = function(*args, **kwargs)
            with lock:
                taken += size(result) - (size(kept.pop(asked)) if asked in kept else 0)
                kept[asked] = result
                while taken > most_bytes and len(kept) > 1:
                    taken -= size(kept.popitem(last=False)[1])
            return result

        return cached

    return decorate
