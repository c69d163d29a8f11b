"""How much is done at once on a CPU.

malloc keeps memory for its next use, but gives large pieces (glibc: over 32 MiB, or several that become free together)
back to the system at once, and the system clears each page before it lends it again, which takes longer than to write
to it. What is done in pieces of half that size uses the same memory over and over.
"""

from itertools import pairwise

BYTES_AT_ONCE = 16 * 2**20


def pieces_at_once(size: int) -> int:
    """How many pieces of `size` bytes each are done at once, at least one."""
    return max(1, BYTES_AT_ONCE // max(1, size))


def runs(start: int, stop: int, size: int) -> list[range]:
    """`range(start, stop)` in as few ranges of at most `size` as there can be, all of about one size."""
    count = -(-(stop - start) // size)
    bounds = [start + (stop - start) * index // count for index in range(count)] + [stop]
    return [range(*pair) for pair in pairwise(bounds)]
