"""Plain files with their checksum beside them: ``NAME.sha256``, a line as ``sha256sum`` writes and checks it.

For what other programs read and people edit, and what therefore is no folder with a manifest: negatives. A file that
has none beside it is taken as it is; one that was changed on purpose loses it by deleting that file.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lexmae import artifact, verification
from lexmae.errors import InputError

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)\n?")


def checksum_path(path: str | Path) -> Path:
    """Where the checksum of a file stands."""
    path = Path(path)
    return path.with_name(path.name + ".sha256")


@contextlib.contextmanager
def checksummed_file(path: str | Path) -> Iterator[IO[bytes]]:
    """As ``artifact.atomic_file`` in mode ``wb``, with the checksum of what was written beside it.

    A process that is killed in between leaves the new file without a checksum, never with that of another.
    """
    path, digest = Path(path), hashlib.sha256()
    with artifact.atomic_file(path, "wb") as out:
        yield _Hashing(out, digest)
        checksum_path(path).unlink(missing_ok=True)
    with artifact.atomic_file(checksum_path(path)) as out:
        out.write(f"{digest.hexdigest()}  {path.name}\n")


def verify(path: str | Path) -> None:
    """Verify a file that has a checksum beside it, unless ``--verify off``.

    Raises:
        InputError: the checksum differs, or what stands beside the file is none of it.
    """
    note = checksum_path(path)
    if verification.level() == "off" or not note.is_file():
        return
    found = _LINE.fullmatch(note.read_bytes()[:4096].decode("utf-8", "replace"))
    name = Path(path).name
    if not found or Path(found[2]).name != name:
        raise InputError(f"is not the checksum of {name}, a line of sha256sum; delete it to do without", note)
    if artifact.checksum(path) != found[1]:
        raise InputError(f"does not have the checksum that {note.name} gives; it was changed or damaged (delete "
                         f"{note.name} if the change was meant)", path)


class _Hashing:
    """A file for writing whose content goes into a digest as well."""

    def __init__(self, file: IO[bytes], digest: hashlib._Hash):
        self._file, self._digest = file, digest

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)
