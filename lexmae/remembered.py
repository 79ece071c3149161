"""Which files this user has verified on this machine, so that what has not changed since is not read in full again.

Each artifact has a record in ``lexmae/verified`` of the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``):
the checksum that its files had, and their states then: size, times of change, inode. A file in another state is
unknown. The time of the last change of an inode (ctime) is among them: a tool that puts a file's modification time back
does not reach it, and a copy has another inode. A record is this machine's own (the machine's name is part of the
record's), since hosts with one home may see different files, or other times and inodes, under the same path.

Nothing here is an error. A folder that cannot be written, or a record that cannot be read, means that nothing is known.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

LIMIT = 1000  # records; those that were not used for the longest time go first
_TICK, _COARSE = 0.02, 2.1  # seconds: file systems count time in steps of up to 0.01, some (FAT) of 2
_SECOND = 10**9  # nanoseconds


class State(NamedTuple):
    """What tells whether a file has changed: bytes, nanoseconds of the content's and of the inode's change, inode."""

    size: int
    modified: int
    changed: int
    inode: int


def settled(folder: Path, names: Iterable[str]) -> dict[str, State]:
    """The states of files, once no later change can leave one as it is. Then read them, and ``keep`` what was found.

    Times of change advance in steps, so this waits for the next one. OSError where a file cannot be opened.
    """
    found = {name: _state(folder / name) for name in names}
    if found:
        time.sleep(_TICK if all(state.changed % _SECOND for state in found.values()) else _COARSE)
    return found


def keep(folder: str | Path, files: Mapping[str, str], before: Mapping[str, State], linked: bool = False) -> None:
    """Remember that files have these checksums, those that are still as they were ``before`` they were read.

    It replaces what was remembered of this folder.

    Args:
        files: checksum of each file.
        linked: the folder took its name since, and hard links of its files may have come and gone, which changes
            inodes, but no content.
    """
    good = {}
    for name, old in before.items():
        with contextlib.suppress(OSError):
            now = _state(Path(folder) / name)
            if name in files and now == (old._replace(changed=now.changed) if linked else old):
                good[name] = [files[name], *now]
    with contextlib.suppress(OSError, RuntimeError):
        record = _record(folder)
        if good:
            _write(record, {"path": os.path.realpath(folder), "files": good})
        else:
            record.unlink()


def unchanged(folder: str | Path, files: Mapping[str, str]) -> dict[str, State]:
    """The states of those files that are known to have these checksums, and have not changed since they were read."""
    found = {}
    for name, (digest, *state) in _read(folder).items():
        with contextlib.suppress(OSError):
            if files.get(name) == digest and list(now := _state(Path(folder) / name)) == state:
                found[name] = now
    return found


def _state(file: Path) -> State:
    """Through an open file: a network file system then asks its server."""
    with open(file, "rb") as handle:
        status = os.fstat(handle.fileno())
    return State(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _record(folder: str | Path) -> Path:
    """The record of an artifact. RuntimeError where nobody knows the user's home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    key = os.fsencode(socket.gethostname()) + b"\0" + os.fsencode(os.path.realpath(folder))
    return base / "lexmae" / "verified" / f"{hashlib.sha256(key).hexdigest()}.json"


def _read(folder: str | Path) -> dict[str, list]:
    try:
        file = _record(folder)
        record = json.loads(file.read_text(encoding="utf-8"))
        files = record["files"] if record["path"] == os.path.realpath(folder) else {}
        good = {name: entry for name, entry in files.items() if len(entry) == 1 + len(State._fields)}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    with contextlib.suppress(OSError):
        os.utime(file)  # in use
    return good


def _write(file: Path, record: Mapping[str, object]) -> None:
    """In one step, so that of two writers the last counts; not flushed: one that is lost is written again."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".")
    try:
        with open(handle, "w", encoding="utf-8") as out:
            json.dump(record, out)
        os.replace(temporary, file)
    except OSError:
        os.unlink(temporary)
        raise
    _prune(file.parent)


def _prune(folder: Path) -> None:
    names = os.listdir(folder)
    if len(names) > LIMIT:
        aged = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process prunes as well
                aged[name] = (folder / name).stat().st_mtime_ns
        for name in sorted(aged, key=aged.__getitem__)[:len(aged) - LIMIT]:
            with contextlib.suppress(FileNotFoundError):
                (folder / name).unlink()
