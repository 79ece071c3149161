"""Dense vectors of documents or queries: ids in memory, a float32 matrix memory-mapped.

Shapes: R rows, H dimensions.

An artifact of kind ``dense`` holds ``ids.arrow`` (column ``id``) and ``matrix.npy`` (float32 [R, H], row ``i`` of the
text ``ids[i]``). Its manifest says what the vectors are (``representation``: ``bottleneck`` or ``cls``), their
dimensions, the side, and the tokenizer hash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lexmae import artifact
from lexmae.errors import InputError
from lexmae.retrieval import checks

KIND = "dense"
IDS, MATRIX = "ids.arrow", "matrix.npy"


@dataclass
class DenseVectors:
    """Dense vectors of R texts.

    Attributes:
        ids: the texts' ids.
        matrix: float32 [R, H].
        extra: facts about their making (representation, side, tokenizer hash, …).
        fingerprint: of the artifact they were read from.
    """

    ids: Sequence[str]
    matrix: np.ndarray
    extra: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dimensions(self) -> int:
        """H."""
        return self.matrix.shape[1]

    def subset(self, rows: Sequence[int]) -> DenseVectors:
        """Some of the texts, in the given order."""
        return DenseVectors([self.ids[row] for row in rows], np.asarray(self.matrix[list(rows)]), self.extra)

    def save(self, path: str | Path, *, inputs: Mapping[str, str | Path] | None = None,
             config: Mapping[str, Any] | None = None, overwrite: bool = False) -> None:
        """Write the artifact ``path``."""
        with artifact.create(path, KIND, inputs=inputs, config=config, overwrite=overwrite) as draft:
            write_ids(draft.path / IDS, self.ids)
            np.save(draft.path / MATRIX, np.asarray(self.matrix, np.float32))
            describe(draft, len(self), self.dimensions, **self.extra)

    @classmethod
    def open(cls, path: str | Path, side: str | None = None) -> DenseVectors:
        """Read a finished artifact, its matrix memory-mapped.

        Args:
            side: ``docs`` or ``queries``: refuse vectors of the other side.

        Raises:
            InputError: not a finished artifact of dense vectors, of the other side, damaged, with an id that occurs
                twice or a value that is not a finite number.
        """
        path = Path(path)
        manifest = artifact.read(path, KIND)
        made_for = manifest.extra.get("side")
        if side is not None and made_for is not None and made_for != side:
            raise InputError(f"these are vectors of {made_for}, but vectors of {side} are needed here", path)
        ids = read_ids(path / IDS)
        if len(set(ids)) != len(ids):
            raise InputError("an id occurs more than once", path / IDS)
        matrix = read_matrix(path / MATRIX)
        checks.check_matrix(matrix, ids, path / MATRIX)
        return cls(ids, matrix, dict(manifest.extra), manifest.fingerprint)


def describe(draft: artifact.Draft, rows: int, dimensions: int, **extra: Any) -> None:
    """Fill the counts and facts of a draft."""
    draft.counts.update(rows=rows)
    draft.extra.update({**extra, "dimensions": dimensions})


def write_ids(path: Path, ids: Sequence[str]) -> None:
    """Write ids as an Arrow file of one column; it appears when it is complete."""
    table = pa.table({"id": pa.array(ids, type=pa.large_string())})
    with artifact.atomic_file(path, "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)


def read_ids(path: Path) -> list[str]:
    """Read what ``write_ids`` wrote; InputError where it is missing or damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()["id"].to_pylist()
    except FileNotFoundError:
        raise InputError("is missing", path) from None
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise InputError(f"not an Arrow file of ids, or a damaged one: {' '.join(str(error).split())}",
                         path) from error


def read_matrix(path: Path) -> np.ndarray:
    """A .npy file as a view of its memory-mapped content; InputError where it is missing or damaged."""
    try:
        empty = path.stat().st_size <= 128
        return np.asarray(np.load(path) if empty else np.load(path, mmap_mode="r"))
    except FileNotFoundError:
        raise InputError("is missing", path) from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"not a .npy file, or a damaged one: {' '.join(str(error).split())}", path) from error
