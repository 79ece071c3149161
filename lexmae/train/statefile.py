"""Files of a checkpoint: flat stretches of named tensors, written one after the other, read in any division.

Each rank writes ``state-R-of-N.safetensors`` with the stretches that it holds. The tensor ``NAME|KEY|START`` of such a
file holds the elements from START on of the value KEY (``weight``, ``exp_avg`` …) of the parameter NAME. A reader joins
them again, whatever the division was. Memory while writing is one stretch; files are mapped for reading.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lexmae.errors import InputError

_PATTERN = "state-*.safetensors"
_TYPES = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64", torch.bool: "BOOL"}


class Stretch(NamedTuple):
    """``count`` elements from ``start`` on of the value ``key`` of the parameter ``name``, laid flat."""

    name: str
    key: str
    start: int
    count: int
    dtype: torch.dtype = torch.float32


def file_name(rank: int, world: int) -> str:
    """The file that a rank writes."""
    return f"state-{rank:05d}-of-{world:05d}.safetensors"


def write(path: Path, plan: Sequence[Stretch], values: Iterable[torch.Tensor]) -> str:
    """Write the stretches of ``plan`` and flush them to disk; returns the sha256 of what was meant to be written.

    Args:
        values: the tensor of each stretch, in order; each is asked for when the one before it is written.

    Raises:
        OSError: the disk is full, or fails.
    """
    header, offset = {}, 0
    for one in plan:
        size = one.count * one.dtype.itemsize
        header[f"{one.name}|{one.key}|{one.start}"] = {"dtype": _TYPES[one.dtype], "shape": [one.count],
                                                       "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as out:
        _put(out, struct.pack("<Q", len(text)) + text, digest)
        for one, value in zip(plan, values, strict=True):
            flat = value.detach().to("cpu", one.dtype).contiguous().view(-1)
            if len(flat) != one.count:
                raise ValueError(f"{one.name}: {one.count} elements are expected, not {len(flat)}")
            _put(out, flat.view(torch.uint8).numpy().data, digest)
        os.fsync(out.fileno())
        if hasattr(os, "posix_fadvise"):  # so that who reads it next reads the disk, not the memory
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def _put(out, data: bytes | memoryview, digest) -> None:
    digest.update(data)
    left = memoryview(data)
    while left:
        left = left[out.write(left):]


class Reader:
    """The values of all files of a checkpoint's folder; a context manager.

    Raises:
        InputError: no files, or one that is no safetensors file of this form.
    """

    def __init__(self, folder: Path):
        self._folder, self._files = folder, ExitStack()
        self._found: dict[tuple[str, str], list[tuple[int, int, object, str]]] = {}  # (start, end, file, tensor)
        paths = sorted(folder.glob(_PATTERN))
        if not paths:
            raise InputError(f"has no {_PATTERN}: not a checkpoint of this version", folder)
        for path in paths:
            try:
                file = self._files.enter_context(safe_open(path, framework="pt"))
                for tensor in file.keys():  # noqa: SIM118 - not a dictionary
                    name, key, start = tensor.rsplit("|", 2)
                    count, = file.get_slice(tensor).get_shape()
                    self._found.setdefault((name, key), []).append((int(start), int(start) + count, file, tensor))
            except (SafetensorError, ValueError, OSError) as error:
                self._files.close()
                raise InputError(f"not a file of a checkpoint: {error}", path) from error
        for stretches in self._found.values():
            stretches.sort(key=lambda one: one[:2])

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def size(self, name: str, key: str) -> int:
        """Elements of a value; 0 where there is none of that name."""
        return max((end for _, end, *_ in self._found.get((name, key), ())), default=0)

    def read(self, name: str, key: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        """``count`` elements from ``start`` on (all by default) of a value, flat.

        Raises:
            InputError: the files do not hold all of them.
        """
        end = self.size(name, key) if count is None else start + count
        parts, place = [], start
        for first, last, file, tensor in self._found.get((name, key), ()):
            if first <= place < last and place < end:
                parts.append(file.get_slice(tensor)[place - first:min(end, last) - first])
                place = min(end, last)
        if place != end:
            raise InputError(f"lacks elements {place} to {end} of {name} ({key})", self._folder)
        return torch.cat(parts) if len(parts) != 1 else parts[0]
