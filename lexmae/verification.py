"""How far artifacts are trusted when a command first uses them: ``--verify``, or ``LEXMAE_VERIFY`` in the environment.

| level | what is checked before an artifact is used |
|---|---|
| ``full`` | as ``fast``, but the checksum of every file, always; of shards also that token ids are in the vocabulary |
| ``fast`` (default) | the manifest's own checksum; that every file is there, of its size, with a header of its kind; |
| | the checksum of every file that is new to this user on this machine, or has changed since it was verified |
| ``off`` | nothing |

So what was copied or edited is read in full once, by the first command that uses it; what was written here has been
verified by its writer (``remembered``). A disk that loses bits leaves sizes and times as they are: after the first use
``full`` alone sees that. Of the ranks of a host the first one checks; the others wait for it where the run begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from lexmae import artifact, remembered
from lexmae.checked import check_header
from lexmae.cli import say
from lexmae.errors import InputError

LEVELS = ("full", "fast", "off")
VARIABLE = "LEXMAE_VERIFY"
_DATA = (".arrow", ".npy")  # readers find these by their names
_LARGE = 1 << 30  # bytes; worth a line
_TRIES = 5  # an artifact may be replaced while it is checked
_NOTE = 5.0  # seconds of reading that may be lost: a command that is stopped has not read in vain

_known: dict[tuple[str, str], tuple] = {}


class _Choice(argparse.Action):
    """Puts the level into the environment, so that every process of the command has it."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        os.environ[VARIABLE] = values


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--verify`` to a command."""
    parser.add_argument("--verify", choices=LEVELS, action=_Choice, dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
                        help=f"what is checked of inputs: all checksums (full), those of files that are new here or "
                             f"have changed (fast), nothing (off); fast unless {VARIABLE} says otherwise")


def level() -> str:
    """The level that is asked for. InputError where the environment names none of ``LEVELS``."""
    asked = os.environ.get(VARIABLE, "fast")
    if asked not in LEVELS:
        raise InputError(f"{VARIABLE} is {asked!r}; known are {', '.join(LEVELS)}")
    return asked


def opened(path: str | Path, kind: str | None = None,
           deep: Callable[[artifact.Manifest], None] | None = None) -> artifact.Manifest:
    """The manifest of an artifact that is about to be used, checked as far as ``level`` says; once in a process.

    Args:
        kind: as of ``artifact.read``.
        deep: with ``full``, what else to check.

    Raises:
        InputError: as ``artifact.read``; or a file is missing, damaged, or none of the artifact's.
    """
    asked, manifest = level(), artifact.read(path, kind)
    if asked == "off" or int(os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or 0):
        return manifest
    key = (os.path.realpath(path), asked)
    state = _state(manifest.path)
    if _known.get(key) != state:
        manifest = verify(path, asked)
        if asked == "full" and deep is not None:
            deep(manifest)
        _known[key] = state
    return manifest


def verify(path: str | Path, level: str = "full") -> artifact.Manifest:
    """Check an artifact; ``level`` is ``full`` or ``fast``.

    Raises:
        InputError: names the first file that is missing, damaged, or none of the artifact's.
    """
    for left in reversed(range(_TRIES)):
        manifest = artifact.read(path)
        try:
            _check(manifest, level)
            return manifest
        except (InputError, FileNotFoundError):
            if not left or artifact.read(path) == manifest:  # else another version took its place meanwhile
                raise
    raise AssertionError("not reached")


def _check(manifest: artifact.Manifest, level: str) -> None:
    folder = manifest.path
    _check_manifest(folder / artifact.MANIFEST)
    if artifact.fingerprint(manifest.files) != manifest.fingerprint:
        raise InputError("the fingerprint is not that of the checksums; it was changed or damaged",
                         folder / artifact.MANIFEST)
    for name in manifest.files:
        file = artifact.inside(folder, name)
        if not file.is_file():
            raise InputError("is listed in the manifest but missing", file)
        size, expected = file.stat().st_size, manifest.sizes.get(name)
        if expected is not None and size != expected:
            raise InputError(f"has {size} bytes, the manifest says {expected}; it was cut, changed or damaged", file)
        check_header(file)
    for file in folder.rglob("*"):
        if file.suffix in _DATA and file.relative_to(folder).as_posix() not in manifest.files:
            raise InputError("is not listed in the manifest; it does not belong to this folder", file)
    _check_content(manifest, {} if level == "full" else remembered.unchanged(folder, manifest.files))


def _check_content(manifest: artifact.Manifest, verified: dict[str, remembered.State]) -> None:
    """Verify the checksums of all files but those that are ``verified`` already; remember those that are right."""
    folder, names = manifest.path, [name for name in manifest.files if name not in verified]
    total = sum((folder / name).stat().st_size for name in names)
    if total > _LARGE:
        say(f"{folder}: verifying checksums of {total / 1e9:.1f} GB")
    before, noted = remembered.settled(folder, names), time.monotonic()
    try:
        for name in names:
            artifact.verify_file(manifest, name)
            verified[name] = before[name]
            if time.monotonic() - noted > _NOTE:
                remembered.keep(folder, manifest.files, verified)
                noted = time.monotonic()
    finally:
        if names:  # also where one is wrong: what was remembered of it no longer holds
            remembered.keep(folder, manifest.files, verified)


def _check_manifest(file: Path) -> None:
    """Whether a manifest is as it was written; those of earlier versions cannot tell."""
    text = file.read_bytes().decode("utf-8", "replace")
    try:
        record = json.loads(text)
        signed, sized = "checksum" in record, "sizes" in record
        good = signed == sized and (not signed or text == artifact.signed(record))
    except (ValueError, TypeError, RecursionError):
        good = False
    if not good:
        raise InputError("does not have the checksum that it gives itself; it was changed or damaged", file)


def _state(folder: Path) -> tuple:
    """What changes when a file is written, added or removed."""
    found = []
    for file in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            found.append((str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return tuple(found)
