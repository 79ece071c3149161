"""One writer at a time: a lock beside what is written, which dies with the process that holds it.

The lock is ``flock`` on the file ``.NAME.lock`` next to ``NAME``. The kernel gives it back however its process ends, so
a file that a killed command left behind locks nothing. Readers do not ask for it.

On NFS, Linux turns ``flock`` into locks of the server, which keep machines apart unless the volume is mounted with
``nolock`` or ``local_lock``; a machine that loses its power keeps its locks until the server's lease ends (90 seconds
as a rule). Where a file system has no locks, a warning says so, and nothing keeps writers apart.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lexmae.cli import say
from lexmae.errors import InputError

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass
class _Held:
    handle: int
    thread: int
    depth: int = 1


_held: dict[Path, _Held] = {}


def lock_file(path: str | Path) -> Path:
    """The file that is locked while ``path`` is written."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def writing(path: str | Path, here: bool = True) -> Iterator[None]:
    """Be the only process that writes ``path``; within a block of the same thread this costs nothing.

    Args:
        here: whether this process writes it; of several ranks one does.

    Raises:
        InputError: another process, or another thread of this one, writes it; names the process.
    """
    if not here:
        yield
        return
    file = lock_file(path)
    held = _held.get(file)
    if held is not None and held.thread == threading.get_ident():
        held.depth += 1
    else:
        handle = _take(file, path)
        if handle is None:
            yield
            return
        held = _held[file] = _Held(handle, threading.get_ident())
    try:
        yield
    finally:
        held.depth -= 1
        if not held.depth and _held.pop(file, None) is held:
            with contextlib.suppress(OSError):
                file.unlink()  # before it is given back: whoever opened it meanwhile sees that it has no name
            os.close(held.handle)


def _take(file: Path, path: str | Path) -> int | None:
    """A locked file handle, None where there are no locks."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(file, _FLAGS, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 1000, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(handle)
            raise InputError(f"is being written by {holder}; wait for it, or choose another output", path) from None
        except OSError as error:
            os.close(handle)
            say(f"warning: {file}: no lock ({error.strerror}); two commands that write {path} are not kept apart")
            return None
        if _has_name(handle, file):
            os.truncate(handle, 0)
            with contextlib.suppress(OSError):  # on a full disk it names nobody
                os.pwrite(handle, _signature().encode(), 0)
            return handle
        os.close(handle)


def _has_name(handle: int, file: Path) -> bool:
    """Whether the locked file is still the one of that name: the holder before removed the file it had."""
    try:
        there = os.stat(file)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(handle))


def _signature() -> str:
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()} ({Path(sys.argv[0] or 'python').name}) since {now}"


def _forget() -> None:
    """A child made by ``fork`` holds nothing, and keeps no lock of its parent alive."""
    for held in _held.values():
        os.close(held.handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
