"""Blocks that a process on a CPU keeps."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lexmae import memory

TAKEN_TWICE = """
import resource, sys
from lexmae import memory
import numpy as np
kept = memory.keep_freed_blocks()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    np.full(1 << 24, 1.0)  # 128 MiB, freed at once
before = faults()
for _ in range(3):
    np.full(1 << 24, 1.0)
print(kept, faults() - before)
"""
PAGES = 3 * (1 << 15)  # of three such blocks


def run(**environment: str) -> tuple[bool, int]:
    """Whether blocks were kept, and how many pages the kernel handed out for blocks that had been freed before."""
    done = subprocess.run([sys.executable, "-c", TAKEN_TWICE], capture_output=True, text=True, check=True,
                          env=environment)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_blocks_are_used_again(monkeypatch):
    assert run() == (True, pytest.approx(0, abs=PAGES / 10))
    kept, faults = run(MALLOC_MMAP_MAX_="65536")  # the user's word counts
    assert not kept and faults > 0


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert memory.keep_freed_blocks() is False
