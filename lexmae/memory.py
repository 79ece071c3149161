"""The memory that a process on a CPU computes in.

glibc gives every block above 32 MiB back to the kernel when it is freed. A training step takes and frees gradients as
large as the vocabulary's matrix many times, and the kernel clears each anew: a third of a step of BERT-base on two
cores, measured (docs/log.md). Kept blocks cost no time, but blocks of other sizes do not fit into them: batches differ,
and what a process holds grows with every step until it is given back (`tidy`).

The heap is one for the process, and so is the state of this module.
"""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3)
_KEPT = 2**31 - 1  # bytes at the end of the heap beyond which memory goes back; the largest that it takes
_GROWTH = 1.5  # times what a step needs, at which freed blocks are given back
_keeps, _need = False, 0  # bytes that a step needs, or 0 where the next one will tell


def keep_freed_blocks() -> bool:
    """Let this process keep freed blocks for its next ones; whether it does. It must call `tidy` then.

    Only glibc knows how. Who sets its variables (`MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`) has the last word.
    """
    global _keeps, _need
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return False
    allocator = ctypes.CDLL(None)
    _keeps, _need = bool(allocator.mallopt(_TRIM_THRESHOLD, _KEPT) and allocator.mallopt(_MMAP_MAX, 0)), 0
    return _keeps


def tidy() -> None:
    """After each step or batch: give kept blocks back where they have come to more than `_GROWTH` times what one needs.

    What one needs is what the process holds after it, beginning with none to spare.
    """
    global _need
    if not _keeps:
        return
    held = _held()
    if not _need:
        _need = held
    elif held > _GROWTH * _need:
        give_back()
        _need = 0


def _held() -> int:
    """Bytes of memory that this process has written, mapped files aside."""
    with open("/proc/self/statm", encoding="ascii") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Return to the kernel what this process has freed, where the C library can."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
