"""Checked reading of text files: what a line is, what UTF-8 is, what an id is.

Every reader of the project goes through here, so that a bad line is always reported as `path:line: reason`.
Only a line feed ends a line (a carriage return before it is dropped): U+2028, U+0085 and the file separators,
which `str.splitlines` also takes for line ends, occur inside real passages. Files may be gzip-compressed,
whatever their name.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lexmae.errors import InputError

_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_LONGEST = 1 << 26  # bytes of a line
_BLANKS = re.compile(r"[ \t]+")
ID_FORBIDDEN = re.compile(r"[ \t\n\r\v\f]")


@contextmanager
def open_bytes(path: str | Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed when it starts with the gzip signature. A broken gzip raises
    InputError.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("is a folder, not a file" if path.is_dir() else "no such file", path=path)
    with path.open("rb") as raw:
        compressed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        if not compressed:
            yield raw
            return
        try:
            with gzip.open(raw, "rb") as unpacked:
                yield unpacked
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"broken gzip file ({error})", path=path) from error


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Pairs (line number, line without its end). Empty lines are skipped; bad UTF-8 raises InputError."""
    with open_bytes(path) as file:
        for number, raw in enumerate(bounded(file, path), 1):
            if number == 1 and raw.startswith(_BOM):
                raw = raw[len(_BOM) :]
            raw = raw[:-1] if raw.endswith(b"\n") else raw
            raw = raw[:-1] if raw.endswith(b"\r") else raw
            if not raw:
                continue
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = raw[error.start]
                reason = (
                    f"not UTF-8: byte 0x{byte:02x} at column {error.start + 1} of the line ({error.reason})"
                )
                raise InputError(reason, path=path, line=number) from None


def bounded(file: IO[bytes], path: str | Path) -> Iterator[bytes]:
    """The lines of a file; one of more than 64 MiB is refused: a compressed file may hold a line of any length."""
    number = 0
    while raw := file.readline(_LONGEST):
        number += 1
        if len(raw) == _LONGEST:
            raise InputError(f"longer than {_LONGEST >> 20} MiB", path=path, line=number)
        yield raw


def read_tsv(path: str | Path, *columns: str) -> Iterator[tuple[int, list[str]]]:
    """Pairs (line number, cells) of a tab-separated file that must have exactly the named columns."""
    for number, line in read_lines(path):
        cells = line.split("\t")
        if len(cells) != len(columns):
            reason = (
                f"expected {len(columns)} tab-separated columns ({', '.join(columns)}), found {len(cells)}"
            )
            raise InputError(reason, path=path, line=number)
        yield number, cells


def read_objects(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Pairs (line number, object) of a JSON-lines file."""
    for number, line in read_lines(path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"invalid JSON at column {error.colno}: {error.msg}"
            raise InputError(reason, path=path, line=number) from None
        except (RecursionError, ValueError) as error:
            raise InputError(f"invalid JSON: {error}", path=path, line=number) from None
        if not isinstance(value, dict):
            raise InputError(f"expected a JSON object, found {_kind(value)}", path=path, line=number)
        if "\\u" in line:
            _check_surrogates(value, path, number)
        yield number, value


def blank_cells(line: str) -> list[str]:
    """Cells separated by spaces or tabs, and by nothing else (a no-break space is part of an id)."""
    return _BLANKS.split(line.strip(" \t"))


def check_id(value: object, what: str, path: str | Path, line: int | None) -> str:
    """An id as a string: a whole number is converted; it must not be empty or hold white space (runs could
    not).
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None:
        raise InputError(f"{what} is missing", path=path, line=line)
    if not isinstance(value, str):
        raise InputError(f"{what} must be a string, found {_kind(value)}", path=path, line=line)
    if not value:
        raise InputError(f"{what} is empty", path=path, line=line)
    if ID_FORBIDDEN.search(value):
        raise InputError(f"{what} {value!r} contains white space", path=path, line=line)
    return value


def check_text(value: object, what: str, path: str | Path, line: int | None) -> str:
    """A string value, or "" for null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{what} must be a string, found {_kind(value)}", path=path, line=line)
    return value


def check_score(value: object, what: str, path: str | Path, line: int) -> float:
    """A finite number, given as a JSON number or as text."""
    try:
        number = (
            float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
        )
    except (ValueError, OverflowError):
        number = None
    if number is None or number != number or number in (float("inf"), float("-inf")):
        raise InputError(f"{what} {value!r} is not a finite number", path=path, line=line)
    return number


def count_lines(path: str | Path) -> int | None:
    """Number of line ends of a plain file; None for a compressed one, which would take long to count."""
    with Path(path).open("rb") as file:
        if file.read(2) == _GZIP_MAGIC:
            return None
        file.seek(0)
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def first_lines(path: str | Path, count: int) -> list[tuple[int, str]]:
    """The first non-empty lines of a file, to tell its format."""
    lines: list[tuple[int, str]] = []
    for item in read_lines(path):
        lines.append(item)
        if len(lines) == count:
            break
    return lines


def _check_surrogates(value: dict, path: str | Path, line: int) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        raise InputError(
            "a \\u escape names half a surrogate pair, which is no text", path=path, line=line
        ) from None


def _kind(value: object) -> str:
    names = {
        "NoneType": "nothing",
        "dict": "an object",
        "list": "a list",
        "bool": "a truth value",
        "str": "a string",
        "int": "a whole number",
        "float": "a fractional number",
    }
    return names.get(type(value).__name__, type(value).__name__)
