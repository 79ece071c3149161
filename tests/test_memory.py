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


GROWN = """
import numpy as np
from lexmae import memory
memory.keep_freed_blocks()
def take(mebibytes):
    np.ones(mebibytes << 17)
    return memory._held() >> 20
take(200)
memory.tidy()  # this is what a step needs
before = take(250)
memory.tidy()
little = memory._held() >> 20
most = take(1000)
memory.tidy()
after = memory._held() >> 20
memory.tidy()  # what a step needs now
print(before, little, most, after, take(30), flush=True)
memory.tidy()
print(memory._held() >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_what_has_grown_beyond_use_is_given_back():
    done = subprocess.run([sys.executable, "-c", GROWN], capture_output=True, text=True, check=True)
    before, little, most, after, need, last = map(int, done.stdout.split())
    assert little == pytest.approx(before, abs=5) and before > 250, "half as much again is kept"
    assert most > 1000 and after < 100 and after + 25 <= need <= after + 35
    assert last < after + 10, "more than half as much again"


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert memory.keep_freed_blocks() is False
