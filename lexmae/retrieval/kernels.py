"""What the searches share: compilation, the choice of the best hits, the division of work among threads.

A hit is kept as one integer key, ``score · 2³¹ + (2³¹ - 1 - document)`` with a score of at most 31 bits: keys are
unique, and the larger key is the better hit, equal scores included (the lower document number comes first).
The kernels are written as plain loops: slices and array functions take numba seconds to compile.
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
    """Move the ``hits`` largest of the first ``found`` keys to the front, in no order; returns how many were kept.

    Hoare's selection; numba's own ``np.partition`` is faster but takes several seconds to compile.
    """
    low, high = 0, found - 1
    while hits < found and low < high:
        pivot = keys[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if hits - 1 <= j:
            high = j
        elif hits - 1 >= i:
            low = i
        else:
            break
    return min(found, hits)


@compiled
def worst(keys, hits):
    """The lowest score among the first ``hits`` keys."""
    lowest = keys[0]
    for i in range(1, hits):
        lowest = min(lowest, keys[i])
    return np.int32(lowest >> 31)


def unpack(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys in any order → document numbers int32 and scores int32, best first."""
    best = -np.sort(-keys)
    return (LIMIT - (best & LIMIT)).astype(np.int32), (best >> 31).astype(np.int32)


def chunks(n: int, threads: int) -> list[tuple[int, int]]:
    """Ranges of queries: several for each thread, none so long that its results hold much memory."""
    size = max(1, min(256, -(-n // (4 * threads))))
    return [(first, min(first + size, n)) for first in range(0, n, size)]
