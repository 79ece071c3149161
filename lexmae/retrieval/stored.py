"""Document vectors left on disk: the parts of an artifact, memory-mapped, whose rows are copied a block at a time.

Shapes: R rows in all, P postings in all.

``SparseVectors.open`` joins several parts in memory. Indexing needs every row once, in the order of the ids, so it
takes them from the maps instead: its memory does not grow with the weights of the collection.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lexmae.errors import InputError
from lexmae.retrieval import checks
from lexmae.retrieval.kernels import frozen, gather
from lexmae.retrieval.vectors import KIND, Csr, SparseVectors, join, part_files, prune, read_batches, read_vocabulary


class StoredVectors(SparseVectors):
    """``SparseVectors`` in parts; joined in memory only when ``ids``, ``indptr``, ``indices`` or ``weights`` is read.

    Attributes:
        id_array: the ids as an Arrow array [R].
        top_k: rows come with at most so many terms, the heaviest.
    """

    def __init__(self, parts: Sequence[tuple[pa.Array, Csr]], vocabulary: list[str], extra: dict | None = None,
                 fingerprint: str | None = None, top_k: int | None = None):
        self.id_array: pa.Array = pa.concat_arrays([ids for ids, _ in parts])
        self._parts = [Csr(*map(frozen, csr)) for _, csr in parts]
        self._first = np.cumsum([0, *(len(ids) for ids, _ in parts)])  # the row that each part begins with
        self.vocabulary, self.extra, self.fingerprint, self.top_k = vocabulary, dict(extra or {}), fingerprint, top_k

    @classmethod
    def open(cls, path: str | Path, side: str | None = None) -> StoredVectors:
        """Map a finished artifact; arguments and errors of ``SparseVectors.open``."""
        manifest = checks.opened(path, KIND, side)
        parts = [batch for file in part_files(path) for batch in read_batches(file)]
        vectors = cls(parts, read_vocabulary(path), dict(manifest.extra), manifest.fingerprint)
        ordered = vectors.id_array.take(vectors.order)
        again = pc.index(pc.equal(ordered[1:], ordered[:-1]), True).as_py() if len(ordered) > 1 else -1
        if again >= 0:
            raise InputError(f"the id '{ordered[again]}' occurs more than once", path)
        for ids, csr in parts:
            checks.check_rows(ids, csr, len(vectors.vocabulary), path)
        return vectors

    @classmethod
    def of(cls, vectors: SparseVectors) -> StoredVectors:
        """Vectors of any kind behind this interface."""
        if isinstance(vectors, StoredVectors):
            return vectors
        ids = pa.array(vectors.ids, type=pa.large_string())
        return cls([(ids, vectors.csr)], vectors.vocabulary, vectors.extra, vectors.fingerprint)

    def __len__(self) -> int:
        return len(self.id_array)

    @cached_property
    def order(self) -> np.ndarray:
        """Rows in the order of their ids' code points, int64 [R]."""
        return pc.array_sort_indices(self.id_array).to_numpy().astype(np.int64)

    @cached_property
    def counts(self) -> np.ndarray:
        """Terms of each row, int64 [R]."""
        whole = np.concatenate([np.diff(csr.indptr) for csr in self._parts])
        return whole if self.top_k is None else np.minimum(whole, self.top_k)

    @property
    def n_postings(self) -> int:
        """P, without reading a weight."""
        return int(self.counts.sum())

    def take(self, rows: np.ndarray) -> Csr:
        """Copies of the rows ``rows`` int64, in their order."""
        of_part = np.searchsorted(self._first, rows, side="right") - 1
        lengths = np.empty(len(rows), np.int64)
        chosen = [(csr, np.flatnonzero(of_part == number)) for number, csr in enumerate(self._parts)]
        local = rows - self._first[of_part]
        for csr, places in chosen:
            lengths[places] = csr.indptr[local[places] + 1] - csr.indptr[local[places]]
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        taken = Csr(indptr, np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.uint16))
        for csr, places in chosen:
            if len(places):
                gather(*csr, local[places], places, *taken)
        return taken if self.top_k is None else prune(taken, self.top_k)

    def pruned(self, top_k: int) -> StoredVectors:
        """The same texts with at most ``top_k`` terms each, pruned when rows are taken."""
        if top_k < 1:
            raise InputError(f"top-k must be at least 1, not {top_k}")
        ids = [self.id_array[a:b] for a, b in zip(self._first, self._first[1:], strict=False)]
        least = top_k if self.top_k is None else min(top_k, self.top_k)
        return StoredVectors(list(zip(ids, self._parts, strict=True)), self.vocabulary, {**self.extra, "top_k": top_k},
                             self.fingerprint, least)

    @cached_property
    def _joined(self) -> Csr:
        whole = join(([], csr) for csr in self._parts)[1]
        return whole if self.top_k is None else prune(whole, self.top_k)

    @cached_property
    def ids(self) -> list[str]:  # type: ignore[override]
        """The ids as a list."""
        return self.id_array.to_pylist()

    @property
    def indptr(self) -> np.ndarray:  # type: ignore[override]
        """Of all parts, in memory."""
        return self._joined.indptr

    @property
    def indices(self) -> np.ndarray:  # type: ignore[override]
        """Of all parts, in memory."""
        return self._joined.indices

    @property
    def weights(self) -> np.ndarray:  # type: ignore[override]
        """Of all parts, in memory."""
        return self._joined.weights
