"""Approximate search with Seismic (Bruch et al., SIGIR 2024): inverted lists in geometric blocks with summaries.

Needs ``pip install "lexmae[seismic]"``. Results are approximate: documents may be missed, but the scores of those found
are dot products, exact for weights up to 2048 (Seismic keeps documents as 16-bit floats of 11 significant bits).

On disk (kind ``index``): ``ids.arrow``, ``vocabulary.json``, ``seismic.index.seismic`` (Seismic's own format). Terms
are known to it by their number, documents by their row in ``ids.arrow``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lexmae import artifact
from lexmae.errors import InputError
from lexmae.retrieval import dense
from lexmae.retrieval.runs import Run
from lexmae.retrieval.vectors import SparseVectors, read_vocabulary, write_vocabulary

_FILE = "seismic"
_SUFFIX = ".index.seismic"
_NARROW = 1 << 16  # terms that Seismic's smaller index can tell apart
_LARGEST = 65504  # of a 16-bit float
_QUERY_CUT = 12  # heaviest terms of a query that are looked up, at effort 1
_HEAP_FACTOR = 0.8  # blocks whose summary scores below this share of the k-th best score are left out, at effort 1


def build(vectors: SparseVectors, draft: artifact.Draft) -> None:
    """Write Seismic's index of document vectors into ``draft``."""
    seismic = _seismic()
    heaviest = int(vectors.weights.max(initial=0))
    unit = 2 if heaviest > _LARGEST else 1
    draft.extra.update(unit=unit, wide=vectors.n_terms > _NARROW)
    dataset_of, index_of = _classes(seismic, draft.extra["wide"])
    with _silent():
        dataset = dataset_of()
        dataset.add_documents_by_id([str(row) for row in range(len(vectors))], vectors.indices.astype(np.int64),
                                    vectors.weights.astype(np.float32) / unit, vectors.indptr.astype(np.int64))
        index_of.build_from_dataset(dataset, **_lists(len(vectors))).save(str(draft.path / _FILE))
    dense.write_ids(draft.path / dense.IDS, vectors.ids)
    write_vocabulary(draft.path, vectors.vocabulary)


def _lists(n_documents: int) -> dict[str, Any]:
    """Postings kept per term, on average and at most. Small collections keep all: cutting lists there costs results
    and saves nothing. The larger numbers are Seismic's for MS MARCO."""
    return {"n_postings": max(4000, min(n_documents, 20_000)), "max_fraction": 6.0}


class SeismicIndex:
    """A finished index, in memory.

    Attributes:
        effort: 1 by default; a larger one finds more of the best documents, more slowly.
    """

    def __init__(self, path: Path):
        seismic = _seismic()
        manifest = artifact.read(path)
        self.ids = dense.read_ids(path / dense.IDS)
        self.vocabulary = read_vocabulary(path)
        self.effort = 1.0
        self._unit: int = manifest.fact("unit", int)
        self._text = seismic.get_seismic_string()
        try:
            with _silent():
                self._index = _classes(seismic, manifest.fact("wide", bool))[1].load(str(path / f"{_FILE}{_SUFFIX}"))
        except Exception as error:
            raise InputError(f"Seismic cannot read it: {error}", path / f"{_FILE}{_SUFFIX}") from error

    def search(self, queries: SparseVectors, hits: int, threads: int) -> Run:
        """Nearly the ``hits`` best documents of every query."""
        names = np.array([str(row) for row in range(len(queries))], dtype=self._text)
        rows = [queries.row(row) for row in range(len(queries))]
        terms = [np.array(list(map(str, found.tolist())), dtype=self._text) for found, _ in rows]
        weights = [found.astype(np.float32) for _, found in rows]
        cut = max(1, min(queries.n_terms, round(_QUERY_CUT * self.effort)))
        factor = _HEAP_FACTOR / self.effort
        started = time.perf_counter()
        with _silent():
            found = self._index.batch_search(names, terms, weights, k=min(hits, len(self.ids)), query_cut=cut,
                                             heap_factor=factor, num_threads=threads)
        run, seconds = Run(self.ids), time.perf_counter() - started
        rankings = {int(ranked[0][0]): ranked for ranked in found if ranked}  # they come in any order
        for row, query in enumerate(queries.ids):
            ranked = rankings.get(row, [])
            scores = np.array([score for _, score, _ in ranked], np.float64) * self._unit
            run.add(query, np.array([int(name) for *_, name in ranked], np.int32), scores)
        run.seconds = seconds
        return run


def _classes(seismic: Any, wide: bool) -> tuple[Any, Any]:
    return (seismic.SeismicDatasetLV, seismic.SeismicIndexLV) if wide else (seismic.SeismicDataset,
                                                                           seismic.SeismicIndex)


def check() -> None:
    """InputError where it is not installed."""
    _seismic()


def _seismic() -> Any:
    try:
        import seismic
    except ImportError:
        raise InputError('the engine seismic is not installed; install it with: pip install "lexmae[seismic]"'
                         ) from None
    return seismic


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what Seismic prints to standard output, past Python, where only results belong."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
