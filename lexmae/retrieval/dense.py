"""Dense vectors of documents or queries: ids in memory, a float32 matrix memory-mapped.

Shapes: R rows, H dimensions.

An artifact of kind ``dense`` holds ``ids.arrow`` (column ``id``) and ``matrix.npy`` (float32 [R, H], row ``i`` of the
text ``ids[i]``). Its manifest says what the vectors are (``representation``: ``bottleneck``, ``cls`` or ``mean``),
their dimensions, the side, and the tokenizer hash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lexmae import artifact
from lexmae.checked import read_array, read_arrow
from lexmae.errors import InputError
from lexmae.retrieval import checks

KIND = "dense"
IDS, MATRIX = "ids.arrow", "matrix.npy"
_IDS = pa.schema([("id", pa.large_string())])


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
        manifest = checks.opened(path, KIND, side)
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
    table = pa.table({"id": pa.array(ids, type=pa.large_string())}, schema=_IDS)
    with artifact.atomic_file(path, "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)


def read_ids(path: Path) -> list[str]:
    """Read what ``write_ids`` wrote; InputError where it is missing or damaged."""
    return [name for batch in read_arrow(path, _IDS) for name in batch.column("id").to_pylist()]


def read_matrix(path: Path) -> np.ndarray:
    """A matrix float32 [R, H] as a view of its memory-mapped file; InputError where it is missing or damaged."""
    return read_array(path, np.float32, ndim=2)
