"""Search of dense vectors by inner product with faiss.

Needs ``pip install "lexmae[dense]"``, or ``faiss-gpu``, which is used where it finds a GPU.

| kind | search | memory |
|---|---|---|
| ``flat`` | exact, compares with every document | 4·H bytes a document |
| ``hnsw`` | approximate, walks a graph | 4·H + 256 bytes |
| ``ivf`` | approximate, compares with the clusters nearest to the query | 4·H + 8 bytes |

Scores are float32 sums. Equal ones are ordered by document id, but which of equal documents are cut off at the last
rank is up to faiss. On disk (kind ``index``): ``ids.arrow`` and ``faiss.index``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from lexmae import artifact
from lexmae.errors import InputError
from lexmae.retrieval import dense
from lexmae.retrieval.dense import DenseVectors
from lexmae.retrieval.runs import Run

KINDS = ("flat", "hnsw", "ivf")
_FILE = "faiss.index"
_NEIGHBOURS, _BUILD_WIDTH = 32, 200  # of HNSW: links of a node, candidates while building
_SEARCH_WIDTH = 128  # candidates while searching, at effort 1; never fewer than the hits
_PROBED = 1 / 4  # share of IVF's clusters that are looked into, at effort 1
_PER_CLUSTER = 39  # fewest vectors that faiss wants for each cluster
_GPU_LARGEST = 2048  # hits, and clusters that are looked into, that faiss takes on a GPU
_BATCH = 1024  # queries searched together


def build(vectors: DenseVectors, draft: artifact.Draft, kind: str = "flat") -> None:
    """Write faiss's index of document vectors into ``draft``; ``kind`` is one of ``KINDS``."""
    faiss = _faiss()
    if kind not in KINDS:
        raise InputError(f"unknown kind of faiss index '{kind}': known are {', '.join(KINDS)}")
    order = sorted(range(len(vectors)), key=lambda row: vectors.ids[row])
    matrix = np.ascontiguousarray(vectors.matrix[order], dtype=np.float32)
    index = _new(faiss, kind, matrix)
    index.add(matrix)
    faiss.write_index(index, str(draft.path / _FILE))
    dense.write_ids(draft.path / dense.IDS, [vectors.ids[row] for row in order])
    draft.extra.update(kind=kind)


def _new(faiss: Any, kind: str, matrix: np.ndarray) -> Any:
    """An index that is trained and empty."""
    n_rows, dimensions = matrix.shape
    if kind == "flat":
        return faiss.IndexFlatIP(dimensions)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimensions, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _BUILD_WIDTH
        return index
    clusters = max(1, min(round(4 * n_rows**0.5), n_rows // _PER_CLUSTER))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimensions), dimensions, clusters, faiss.METRIC_INNER_PRODUCT)
    index.train(matrix)
    return index


class FaissIndex:
    """A finished index, on the GPUs where faiss finds some.

    Attributes:
        dimensions: of its vectors.
        effort: 1 by default; a larger one finds more of the best documents, more slowly. ``flat`` is exact anyway.
    """

    def __init__(self, path: Path):
        self._faiss = _faiss()
        self.effort = 1.0
        self.ids = dense.read_ids(path / dense.IDS)
        self.kind: str = artifact.read(path).fact("kind", str)
        try:
            self._index = self._faiss.read_index(str(path / _FILE))
        except RuntimeError as error:
            raise InputError("faiss cannot read it: it is missing or damaged", path / _FILE) from error
        self.dimensions: int = self._index.d

    def search(self, queries: DenseVectors, hits: int, threads: int) -> Run:
        """The ``hits`` best documents of every query: exactly with ``flat``, nearly with the others."""
        self._faiss.omp_set_num_threads(threads)
        hits = min(hits, len(self.ids))
        index = self._prepared(hits)
        matrix = np.ascontiguousarray(queries.matrix, dtype=np.float32)
        run, seconds = Run(self.ids), 0.0
        for start in range(0, len(matrix) if hits else 0, _BATCH):
            started = time.perf_counter()
            scores, rows = index.search(matrix[start:start + _BATCH], hits)
            seconds += time.perf_counter() - started
            for query, best, found in zip(queries.ids[start:start + _BATCH], scores, rows, strict=True):
                run.add(query, found[found >= 0], best[found >= 0])  # -1: fewer were found
        run.seconds = seconds
        return run

    def _prepared(self, hits: int) -> Any:
        """The index with the settings of the effort, on the GPUs where there are some and they can."""
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = max(hits, min(self._index.ntotal, round(_SEARCH_WIDTH * self.effort)))
        if self.kind == "ivf":
            self._index.nprobe = max(1, min(self._index.nlist, round(self._index.nlist * _PROBED * self.effort)))
        gpus = self._faiss.get_num_gpus() if hasattr(self._faiss, "index_cpu_to_all_gpus") else 0
        most = max(hits, self._index.nprobe if self.kind == "ivf" else 0)
        if gpus == 0 or self.kind == "hnsw" or most > _GPU_LARGEST:
            return self._index
        return self._faiss.index_cpu_to_all_gpus(self._index)


def check() -> None:
    """InputError where it is not installed."""
    _faiss()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError('the engine faiss is not installed; install it with: pip install "lexmae[dense]"') from None
    return faiss
