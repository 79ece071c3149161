"""What the compiled searches share: compilation, the choice of the best hits, the division of work among threads.

A hit is kept as one integer key, ``score · 2³¹ + (2³¹ - 1 - document)`` with a score of at most 31 bits: keys are
unique, and the larger key is the better hit, equal scores included (the lower document number comes first).
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

LIMIT = 2**31 - 1


def compiled(function: Callable) -> Callable:
    """Compile without the interpreter lock; keep the machine code on disk where a cache folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no folder it may write to
        return numba.njit(nogil=True)(function)


@compiled
def keep_best(keys, found, hits):
    """Move the ``hits`` largest of the first ``found`` keys to the front; returns how many were kept."""
    if found <= hits:
        return found
    keys[:hits] = np.partition(keys[:found], found - hits)[found - hits:]
    return hits


def unpack(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys in any order → document numbers int32 and scores int32, best first."""
    best = -np.sort(-keys)
    return (LIMIT - (best & LIMIT)).astype(np.int32), (best >> 31).astype(np.int32)


def chunks(n: int, threads: int) -> list[tuple[int, int]]:
    """Ranges of queries: several for each thread, none so long that its results hold much memory."""
    size = max(1, min(256, -(-n // (4 * threads))))
    return [(first, min(first + size, n)) for first in range(0, n, size)]
