"""Signs of life between ranks: a rank that is lost or hangs is named, and the others stop instead of waiting for it.

A machine that loses its power or its network says nothing. Its peers would wait in a collective until that times out,
and then report an address. Here every rank beats: it counts upwards in a store that all ranks reach (torch's
``TCPStore``, which rank 0 serves), and says how far the run has come on it (``at``).

- A rank that has not counted for ``limit`` seconds is lost; where the store itself is silent, that is rank 0. On one
  machine the launcher sees processes that end, so only a stopped one is silent, and the limit is that of a hung rank.
- Where all count, and none has come any further for ``hung_limit`` seconds, the one that is behind hangs.
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
from typing import NamedTuple, NoReturn, Protocol

from lexmae.errors import one_line
from lexmae.ranks import rank_and_world, several_hosts

LIMIT = "LEXMAE_LIFELINE"  # environment: seconds without a sign of life after which a rank is lost; 0 turns it off
_DEFAULT_LIMIT = 40.0
HUNG = "LEXMAE_HUNG"  # environment: seconds without progress on any rank after which the run is hung; 0 turns it off
_DEFAULT_HUNG = 1800.0
_EVERY = 2.0  # seconds between beats
_NETWORK = ("connection", "gloo", "nccl", "socket", "peer", "timed out", "timeout")  # words of a broken collective
_DONE, _FAILED = "done", "failed: "
_ADVICE = ": stopping; --resume auto continues from the last checkpoint"


class Store(Protocol):
    """What a ``torch.distributed.Store`` does."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


def limit() -> float:
    """Seconds after which a silent rank is lost: the environment's ``LEXMAE_LIFELINE``, else 40."""
    return _seconds(LIMIT, _DEFAULT_LIMIT)


def hung_limit() -> float:
    """Seconds without any progress after which a run is hung: the environment's ``LEXMAE_HUNG``, else 1800."""
    return _seconds(HUNG, _DEFAULT_HUNG)


def _seconds(name: str, default: float) -> float:
    try:
        return max(0.0, float(os.environ.get(name, default)))
    except ValueError:
        return default


_marks, _place = 0, ""  # how many places this rank has come by, and the last


def at(place: str) -> None:
    """Note how far the run has come on this rank; every rank comes by the same places in the same order."""
    global _marks, _place
    _marks, _place = _marks + 1, place


class _Sign(NamedTuple):
    """What a rank said last: its number of beats, or how it ended; where it is; since when (this rank's clock)."""

    beat: str
    marks: int
    place: str
    since: float
    there_since: float


def _stop(message: str) -> None:
    """Say it and leave at once: the main thread waits in a collective that will not end."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


class Lifeline:
    """This rank's sign of life, and its watch over the others.

    Args:
        store: reaches all ranks; used by this object alone, since a call may block.
        limit: seconds of silence after which a rank is lost.
        hung: seconds without progress on any rank after which the run is hung; 0 has no such limit.
        every: seconds between beats.
        stop: called once, from another thread, with the message that names the lost rank; ends the process.
    """

    def __init__(self, store: Store, rank: int, world: int, limit: float, hung: float = 0.0, every: float = _EVERY,
                 stop: Callable[[str], None] = _stop):
        self._store, self.rank, self.world = store, rank, world
        self._limit, self._hung, self._every, self._stop = limit, hung, every, stop
        self._closed = threading.Event()
        self._lock = threading.Lock()  # over the store
        self._heard = time.monotonic()  # when the store answered last
        self._seen: dict[int, _Sign] = {}
        self._hosts: dict[int, str] = {}
        store.set(f"lifeline/host/{rank}", socket.gethostname())
        store.set(f"lifeline/beat/{rank}", "0 0 ")

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
        now, signs = time.monotonic(), dict(self._seen)
        if self.rank != 0 and now - self._heard > self._limit:
            return self._silent(0, now - self._heard)
        for rank, sign in signs.items():
            if sign.beat.startswith(_FAILED):
                return f"{self._name(rank)} failed: {sign.beat.removeprefix(_FAILED)}"
            if sign.beat != _DONE and self._heard - sign.since > self._limit:  # judged by what the store has told
                return self._silent(rank, self._heard - sign.since)
        return self._stuck(signs)

    def _stuck(self, signs: dict[int, _Sign]) -> str | None:
        """The rank that is behind, where none has come any further for long."""
        if not self._hung or len(signs) < self.world or any(not sign.marks for sign in signs.values()):
            return None
        still = min(self._heard - sign.there_since for sign in signs.values())
        if still <= self._hung:
            return None
        behind = min(signs, key=lambda rank: (signs[rank].marks, rank))
        ahead = max(signs.values(), key=lambda sign: sign.marks)
        if ahead.marks == signs[behind].marks:
            what = f"all ranks have been at '{ahead.place}' for {still:.0f} s"
        else:
            what = (f"{self._name(behind)} has hung at '{signs[behind].place}' for {still:.0f} s, while others wait at "
                    f"'{ahead.place}'")
        return what + _ADVICE

    def wait_for_verdict(self) -> str | None:
        """``lost()`` as soon as it is known, or None after ``limit`` seconds: a broken connection is noticed first."""
        end = time.monotonic() + min(self._limit, _DEFAULT_LIMIT) + 2 * self._every
        while (found := self.lost()) is None and time.monotonic() < end:
            time.sleep(self._every / 4)
        return found

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts.get(rank, 'an unknown host')}"

    def _silent(self, rank: int, seconds: float) -> str:
        last = f" (last at '{self._seen[rank].place}')" if rank in self._seen and self._seen[rank].place else ""
        return f"{self._name(rank)} has given no sign of life for {seconds:.0f} s{last}{_ADVICE}"

    def _beat(self) -> None:
        count, before = 0, time.monotonic()
        while not self._closed.wait(self._every):
            count += 1
            own = f"{count} {_marks} {_place}"
            try:
                with self._lock:
                    self._store.set(f"lifeline/beat/{self.rank}", own)
                    values = {rank: self._store.get(f"lifeline/beat/{rank}").decode() for rank in range(self.world)
                              if rank != self.rank}
            except Exception:  # the store is gone or silent: `lost` counts the seconds since it answered
                time.sleep(self._every)
                continue
            now = time.monotonic()
            slept, before = now - before > max(5 * self._every, self._limit / 2), now
            self._note({**values, self.rank: own}, now, slept)

    def _note(self, values: dict[int, str], now: float, slept: bool) -> None:
        """Take what the ranks have said.

        Args:
            slept: this rank was stopped itself (Ctrl-Z), so what it has not heard says nothing.
        """
        for rank, value in values.items():
            ended = value == _DONE or value.startswith(_FAILED)
            beat, marks, place = (value, "0", "") if ended else value.split(" ", 2)
            old = self._seen.get(rank)
            same = old is not None and not slept
            self._seen[rank] = _Sign(beat, int(marks), place, old.since if same and old.beat == beat else now,
                                     old.there_since if same and old.marks == int(marks) else now)
        self._heard = now

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._every):
            now = time.monotonic()
            slept, before = now - before > 5 * self._every, now
            found = None if slept else self.lost()
            # A failed rank breaks its connections, which the main thread reports; this is for those that never will.
            if found is not None and self._patience_is_over():
                self._stop(found)
                return

    def _patience_is_over(self) -> bool:
        failed = [sign.since for sign in list(self._seen.values()) if sign.beat.startswith(_FAILED)]
        return not failed or time.monotonic() - min(failed) > min(self._limit, _DEFAULT_LIMIT)


_current: Lifeline | None = None


def begin() -> None:
    """Start this rank's lifeline where there are others; every rank calls it within its process group."""
    global _current
    rank, world = rank_and_world()
    silence = limit() if several_hosts() else hung_limit()
    if world == 1 or silence == 0:
        return
    import torch.distributed as dist

    # a connection of its own: a call on the group's would wait for one that blocks in another thread
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False,
                          timeout=datetime.timedelta(seconds=silence))
    _current = Lifeline(store, rank, world, silence, hung_limit())
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
        _current.close(one_line(error))
    if found is None:
        raise error
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {found}", file=sys.stderr, flush=True)
    raise SystemExit(1) from error
