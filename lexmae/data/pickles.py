"""Pickles of plain values: reading one must neither run code nor take memory that the file does not account for."""

from __future__ import annotations

import contextlib
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lexmae.data.lines import open_bytes
from lexmae.errors import InputError

_SPARE = 1 << 30  # bytes of memory that any file may take
_GROWTH, _GROWTH_GZIP = 64, 1024  # … and bytes for each byte of a file: objects of Python are large


class _PlainUnpickler(pickle.Unpickler):
    """Admits dict, list, tuple, int, float and str. Looking up any name, the way to run code, is refused."""

    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(
            f"names {module}.{name}; only dict, list, tuple, int, float and str are admitted"
        )

    def persistent_load(self, pid: object) -> object:
        raise pickle.UnpicklingError("refers to an object outside the file")


def load_plain(path: str | Path) -> Any:
    """The value of a pickle that consists of plain values.

    Memory is limited meanwhile: the unpickler makes its memo as long as the largest place that a file names, and five
    bytes can ask for 64 GB.

    Raises:
        InputError: it names anything else, or is no complete pickle.
    """
    with open_bytes(path) as file, _limited(Path(path)):
        try:
            return _PlainUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError,
                OverflowError, MemoryError, RecursionError, ImportError) as error:  # fmt: skip
            raise InputError(f"not an admissible pickle: {error or type(error).__name__}", path=path) from None


@contextlib.contextmanager
def _limited(path: Path) -> Iterator[None]:
    """At most as much more memory for this process as a file of this size can need; no limit outside Linux."""
    with open(path, "rb") as file:
        growth = _GROWTH_GZIP if file.read(2) == b"\x1f\x8b" else _GROWTH
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + _SPARE + growth * path.stat().st_size
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
