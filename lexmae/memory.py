"""The memory that a process on a CPU computes in.

glibc gives every block above 32 MiB back to the kernel when it is freed. A training step takes and frees gradients as
large as the vocabulary's matrix many times, and the kernel clears each anew: a third of a step of BERT-base on two
cores, measured (docs/log.md). Kept blocks cost no time; what a process holds at its peak stays about the same.
"""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3)
_KEPT = 2**31 - 1  # bytes at the end of the heap beyond which memory goes back; the largest that it takes


def keep_freed_blocks() -> bool:
    """Let this process keep freed blocks for its next ones; whether it does.

    Only glibc knows how. Who sets its variables (`MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`) has the last word.
    """
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return False
    allocator = ctypes.CDLL(None)
    return bool(allocator.mallopt(_TRIM_THRESHOLD, _KEPT) and allocator.mallopt(_MMAP_MAX, 0))


def give_back() -> None:
    """Return to the kernel what this process has freed, where the C library can."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
