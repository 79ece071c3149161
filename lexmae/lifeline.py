"""Signs of life between ranks: a rank whose machine died is named, and the others stop instead of waiting for it.

A machine that loses its power or its network says nothing. Its peers would wait in a collective until that times out,
and then report an address. Here every rank beats: it counts upwards in a store that all ranks reach (torch's
``TCPStore``, which rank 0 serves). A rank that has not counted for ``limit`` seconds is lost; where the store itself
is silent, that is rank 0. On one machine the launcher sees its processes, and nothing is done here.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, Protocol

from lexmae.ranks import rank_and_world, several_hosts

LIMIT = "LEXMAE_LIFELINE"  # environment: seconds without a sign of life after which a rank is lost; 0 turns it off
_DEFAULT_LIMIT = 40.0
_EVERY = 2.0  # seconds between beats
_NETWORK = ("connection", "gloo", "nccl", "socket", "peer", "timed out", "timeout")  # words of a broken collective
_DONE, _FAILED = "done", "failed: "


class Store(Protocol):
    """What a ``torch.distributed.Store`` does."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


def limit() -> float:
    """Seconds after which a silent rank is lost: the environment's ``LEXMAE_LIFELINE``, else 40."""
    try:
        return max(0.0, float(os.environ.get(LIMIT, _DEFAULT_LIMIT)))
    except ValueError:
        return _DEFAULT_LIMIT


def _stop(message: str) -> None:
    """Say it and leave at once: the main thread waits in a collective that will not end."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


class Lifeline:
    """This rank's sign of life, and its watch over the others.

    Args:
        store: reaches all ranks; used by this object alone, since a call may block.
        limit: seconds of silence after which a rank is lost.
        every: seconds between beats.
        stop: called once, from another thread, with the message that names the lost rank; ends the process.
    """

    def __init__(self, store: Store, rank: int, world: int, limit: float, every: float = _EVERY,
                 stop: Callable[[str], None] = _stop):
        self._store, self.rank, self.world = store, rank, world
        self._limit, self._every, self._stop = limit, every, stop
        self._closed = threading.Event()
        self._lock = threading.Lock()  # over the store
        self._heard = time.monotonic()  # when the store answered last
        self._seen: dict[int, tuple[str, float]] = {}  # rank → its last value, and when that was new
        self._hosts: dict[int, str] = {}
        store.set(f"lifeline/host/{rank}", socket.gethostname())
        store.set(f"lifeline/beat/{rank}", "0")

    def start(self) -> None:
        """Begin to beat and to watch; every rank has made its object by now."""
        self._hosts = {rank: self._store.get(f"lifeline/host/{rank}").decode() for rank in range(self.world)}
        self._heard = time.monotonic()
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name="lifeline", daemon=True).start()

    def close(self, failure: str | None = None) -> None:
        """Stop beating; the others are told that this rank has finished, or why it failed."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._lock.acquire(timeout=self._every):  # not held for longer unless the store is silent
            try:
                with contextlib.suppress(RuntimeError, OSError):  # rank 0, which serves the store, has left already
                    self._store.set(f"lifeline/beat/{self.rank}", _DONE if failure is None else _FAILED + failure)
            finally:
                self._lock.release()

    def lost(self) -> str | None:
        """What is wrong with another rank, in one line that names it and its host; None while all are well."""
        now = time.monotonic()
        if self.rank != 0 and now - self._heard > self._limit:
            return self._silent(0, now - self._heard)
        for rank, (value, since) in list(self._seen.items()):
            if value.startswith(_FAILED):
                return f"{self._name(rank)} failed: {value.removeprefix(_FAILED)}"
            if value != _DONE and self._heard - since > self._limit:  # judged by what the store has told
                return self._silent(rank, self._heard - since)
        return None

    def wait_for_verdict(self) -> str | None:
        """``lost()`` as soon as it is known, or None after ``limit`` seconds: a broken connection is noticed first."""
        end = time.monotonic() + self._limit + 2 * self._every
        while (found := self.lost()) is None and time.monotonic() < end:
            time.sleep(self._every / 4)
        return found

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts.get(rank, 'an unknown host')}"

    def _silent(self, rank: int, seconds: float) -> str:
        return (f"{self._name(rank)} has given no sign of life for {seconds:.0f} s: stopping; "
                "--resume auto continues from the last checkpoint")

    def _beat(self) -> None:
        count = 0
        while not self._closed.wait(self._every):
            count += 1
            try:
                with self._lock:
                    self._store.set(f"lifeline/beat/{self.rank}", str(count))
                    values = {rank: self._store.get(f"lifeline/beat/{rank}").decode() for rank in range(self.world)
                              if rank != self.rank}
            except Exception:  # the store is gone or silent: `lost` counts the seconds since it answered
                time.sleep(self._every)
                continue
            self._heard = time.monotonic()
            for rank, value in values.items():
                if self._seen.get(rank, ("", 0.0))[0] != value:
                    self._seen[rank] = value, self._heard

    def _watch(self) -> None:
        while not self._closed.wait(self._every):
            found = self.lost()
            # A failed rank breaks its connections, which the main thread reports; this is for those that never will.
            if found is not None and self._patience_is_over():
                self._stop(found)
                return

    def _patience_is_over(self) -> bool:
        failed = [since for value, since in list(self._seen.values()) if value.startswith(_FAILED)]
        return not failed or time.monotonic() - min(failed) > self._limit


_current: Lifeline | None = None


def begin() -> None:
    """Start this rank's lifeline where the run spans several hosts; every rank calls it within its process group."""
    global _current
    rank, world = rank_and_world()
    if limit() == 0 or not several_hosts():
        return
    import torch.distributed as dist

    # a connection of its own: a call on the group's would wait for one that blocks in another thread
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False,
                          timeout=datetime.timedelta(seconds=limit()))
    _current = Lifeline(store, rank, world, limit())
    dist.barrier()
    _current.start()


def end() -> None:
    """This rank has finished; where it failed, ``blame`` came before."""
    if _current is not None:
        _current.close()


def blame(error: Exception) -> NoReturn:
    """Raise ``error``, or leave with a line that names another rank where that one's death or failure is the cause.

    A collective whose peer has gone fails with the address of a connection; it takes some seconds to know whose.
    """
    found = None
    if _current is not None:
        if any(word in str(error).lower() for word in _NETWORK):
            found = _current.wait_for_verdict()
        _current.close(" ".join(str(error).split())[:300] or type(error).__name__)
    if found is None:
        raise error
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {found}", file=sys.stderr, flush=True)
    raise SystemExit(1) from error
