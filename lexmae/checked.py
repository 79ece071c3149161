"""Checked reading of the binary and JSON files of artifacts: whatever the bytes, the outcome is data or an InputError.

A file may be damaged, or come from someone else. Nothing here runs code from a file, believes a length that the file
cannot hold, or gives out an array whose offsets lead outside its buffers: compiled loops do not check them again.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lexmae.errors import InputError

_HEADER = 1 << 12  # bytes; numpy writes 128
_NPY = re.compile(rb"\x93NUMPY(?:\x01\x00..|[\x02\x03]\x00....)\{'descr': '(?P<type>[<>|=]?\w{1,8})', "
                  rb"'fortran_order': False, 'shape': "
                  rb"\((?P<shape>(?:[0-9]{1,18},|[0-9]{1,18}(?:, [0-9]{1,18}){1,7})?)\), \} *\n", re.DOTALL)

_ARROW = b"ARROW1"

LOADING_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError,
                  RuntimeError, EOFError, SyntaxError, pickle.UnpicklingError, struct.error, SafetensorError)
"""What transformers and torch raise for files that are damaged or hold other values than they expect."""

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def read_json(path: str | Path, kind: type = object) -> Any:
    """The value of a JSON file, of a type where one is given.

    Raises:
        InputError: the file is missing, not JSON, nested too deeply, or another type.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("is missing", path) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", path, getattr(error, "lineno", None)) from error
    if not isinstance(value, kind):
        raise InputError(f"holds a {type(value).__name__}, a {kind.__name__} is needed", path)
    return value


def read_strings(path: str | Path) -> list[str]:
    """A JSON list of strings. InputError as ``read_json``."""
    values = read_json(path, list)
    if not all(type(value) is str for value in values):
        raise InputError("holds something other than text", path)
    return values


def read_array(path: str | Path, dtype: np.dtype | type | str, ndim: int = 1) -> np.ndarray:
    """An array of a ``.npy`` file, memory-mapped and read-only; pickled objects are refused.

    Raises:
        InputError: the file is missing or no array, of another type or number of axes, or shorter than it says.
    """
    import numpy as np

    path, kind = Path(path), np.dtype(dtype)
    try:
        found = _npy_header(path)
    except FileNotFoundError:
        raise InputError("is missing", path) from None
    shape = _shape(found)
    if found["type"].decode() != kind.str or len(shape) != ndim:
        raise InputError(f"holds {found['type'].decode()} in {len(shape)} axes, {kind.str} in {ndim} is needed", path)
    if kind.hasobject:
        raise InputError("not an array of numbers", path)
    if path.stat().st_size != found.end() + math.prod(shape) * kind.itemsize:
        raise InputError(f"is not as long as an array of {shape} should be", path)
    if 0 in shape:  # nothing to map
        return np.zeros(shape, kind)
    return np.asarray(np.memmap(path, kind, "r", found.end(), shape)).view(np.ndarray)


def _npy_header(path: Path) -> re.Match[bytes]:
    with open(path, "rb") as file:
        found = re.match(_NPY, file.read(_HEADER))
    if not found:
        raise InputError("not an array in C order", path)
    return found


def _shape(header: re.Match[bytes]) -> tuple[int, ...]:
    return tuple(int(size) for size in re.findall(rb"[0-9]+", header["shape"]))


def check_header(path: str | Path) -> None:
    """Whether an array, Arrow or safetensors file begins and ends as its kind does; nothing for other files.

    Raises:
        InputError: it does not.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        if path.suffix == ".arrow":
            file.seek(max(0, size - len(_ARROW)))
            if not head.startswith(_ARROW) or file.read() != _ARROW:
                raise InputError("not an Arrow file, or not a complete one", path)
        elif path.suffix == ".npy":
            found = _npy_header(path)
            kind = re.fullmatch(rb"[<>|=]?[biufc]([0-9]+)", found["type"])
            length = math.prod(_shape(found)) * int(kind[1]) if kind else size - found.end()
            if size != found.end() + length:
                raise InputError(f"is not as long as an array of {_shape(found)} should be", path)
        elif path.suffix == ".safetensors":
            _check_safetensors(head, file.read(min(size, int.from_bytes(head, "little"))), size, path)


def _check_safetensors(head: bytes, table: bytes, size: int, path: Path) -> None:
    try:
        entries = json.loads(table)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        whole = len(head) + len(table) + max(ends, default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise InputError("not a safetensors file, or a damaged one", path) from error
    if whole != size:
        raise InputError("is not as long as its tensors should be", path)


def read_arrow(path: str | Path, *schemas: pa.Schema) -> list[pa.RecordBatch]:
    """The record batches of an Arrow IPC file, memory-mapped, of one of these schemas, without nulls.

    Every offset and every text is validated.

    Raises:
        InputError: the file is missing, no complete Arrow file, of other columns, or inconsistent.
    """
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
        if not any(reader.schema.equals(schema) for schema in schemas):
            needed = ", ".join(f"{field.name}: {field.type}" for field in schemas[0])
            found = ", ".join(f"{field.name}: {field.type}" for field in reader.schema)
            raise InputError(f"has the columns {found[:200]}, needed are {needed}", path)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
    except FileNotFoundError:
        raise InputError("is missing", path) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise InputError(f"not a complete Arrow file: {' '.join(str(error).split())[:300]}", path) from error
    if any(column.null_count for batch in batches for column in batch.columns):
        raise InputError("holds nulls", path)
    return batches


def check_offsets(offsets: np.ndarray, end: int, path: str | Path, what: str = "offsets") -> np.ndarray:
    """Offsets that begin with 0, never descend, and end with ``end``; given back. InputError where they do not."""
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != end or (offsets[1:] < offsets[:-1]).any():
        raise InputError(f"{what} do not ascend from 0 to {end}", path)
    return offsets


def check_range(values: np.ndarray, end: int, path: str | Path, what: str) -> np.ndarray:
    """Whole numbers from 0 to ``end - 1``; given back. InputError where one is not."""
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < end:
        raise InputError(f"{what} reach from {values.min()} to {values.max()}, allowed are 0 to {end - 1}", path)
    return values
