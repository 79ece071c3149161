"""Search engines behind one interface: build an index from document vectors, search it with query vectors.

| engine | where it runs | what it needs |
|---|---|---|
| ``exact`` | in this process, compiled | nothing more |
| ``anserini`` | Lucene's impact index, in a Java process | ``pip install "lexmae[anserini]"`` |
| ``seismic`` | in this process; approximate, low latency | ``pip install "lexmae[seismic]"`` |
| ``faiss`` | in this process or on GPUs; dense vectors | ``pip install "lexmae[dense]"`` |

An index is an artifact of kind ``index``; its manifest names its engine, so a search need not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lexmae import artifact, verification
from lexmae.errors import InputError
from lexmae.retrieval import checks, dense
from lexmae.retrieval import vectors as sparse
from lexmae.retrieval.dense import DenseVectors
from lexmae.retrieval.runs import Run
from lexmae.retrieval.vectors import SparseVectors

KIND = "index"
Vectors = SparseVectors | DenseVectors


class Searcher(Protocol):
    """What an engine gives for a finished index folder.

    An approximate one also has ``effort``; one that runs another program has ``log``, what that printed last.
    """

    vocabulary: list[str]  # of sparse vectors; an engine of dense ones has ``dimensions``

    def search(self, queries: Vectors, hits: int, threads: int) -> Run: ...


_Engine = tuple[Callable, Callable, Callable[[], None]]


def _nothing() -> None:
    """What an engine needs that needs nothing."""


def _exact() -> _Engine:
    from lexmae.retrieval import exact

    return exact.build, exact.ExactIndex, _nothing


def _anserini() -> _Engine:
    from lexmae.retrieval import anserini

    return anserini.build, anserini.AnseriniIndex, anserini.check


def _seismic() -> _Engine:
    from lexmae.retrieval import seismic

    return seismic.build, seismic.SeismicIndex, seismic.check


def _faiss() -> _Engine:
    from lexmae.retrieval import faiss_engine

    return faiss_engine.build, faiss_engine.FaissIndex, faiss_engine.check


# name → () → (build(vectors, draft), open(folder), check()); engines are imported when they are used
ENGINES: dict[str, Callable[[], _Engine]] = {"exact": _exact, "anserini": _anserini, "seismic": _seismic,
                                             "faiss": _faiss}
DENSE = ("faiss",)  # search dense vectors; the others sparse ones
SPARSE = tuple(name for name in ENGINES if name not in DENSE)


class Index:
    """A finished index of any engine.

    Attributes:
        engine: its name.
        manifest: of the artifact.
    """

    def __init__(self, manifest: artifact.Manifest):
        self.manifest = manifest
        self.engine: str = manifest.fact("engine", str)
        self._searcher: Searcher = _engine(self.engine)[1](manifest.path)
        self._agreed: list[str] | None = None  # the vocabulary last found equal: comparing takes longer than a query

    def __len__(self) -> int:
        return self.manifest.fact("rows", int, "counts")

    @property
    def approximate(self) -> bool:
        """Whether it may miss documents, and ``set_effort`` says how hard it looks."""
        return hasattr(self._searcher, "effort")

    @property
    def log(self) -> str:
        """What another program that did the last search printed; empty for engines of this process."""
        return getattr(self._searcher, "log", "")

    def set_effort(self, effort: float) -> None:
        """How hard an approximate engine looks: 1 by default, more finds more and is slower.

        Raises:
            InputError: the engine is exact, or ``effort`` is not above 0 and finite.
        """
        if not self.approximate:
            raise InputError(f"the engine {self.engine} is exact: there is no effort to set")
        if not 0 < effort < math.inf:
            raise InputError(f"effort must be a number above 0, not {effort:g}")
        self._searcher.effort = effort

    def search(self, queries: Vectors, hits: int = 1000, threads: int | None = None,
               device: str = "cpu") -> Run:
        """The ``hits`` best documents of every query, by dot product; ties by document id.

        Documents that share no term with the query are not found. ``run.seconds`` is the time the search took.

        Args:
            threads: all processors by default.
            device: ``cuda`` searches an exact index on a GPU, with the same result.

        Raises:
            InputError: the queries were encoded with another vocabulary or another scale than the documents, or are of
                another kind.
        """
        if hits < 1:
            raise InputError(f"hits must be at least 1, not {hits}")
        self._check(queries)
        if device != "cpu":
            if self.engine != "exact":
                raise InputError(f"the engine {self.engine} does not search on {device}; exact does")
            from lexmae.retrieval.device import DeviceIndex

            return DeviceIndex(self._searcher, device).search(queries, hits)
        return self._searcher.search(queries, hits, threads or default_threads())

    def open_queries(self, path: str | Path) -> Vectors:
        """Query vectors of the kind that the engine searches."""
        return open_vectors(path, self.engine, "queries")

    def _check(self, queries: Vectors) -> None:
        if isinstance(queries, DenseVectors):
            self._check_dense(queries)
        elif queries.vocabulary is not self._agreed and queries.vocabulary != self._searcher.vocabulary:
            raise InputError("its documents were encoded with another vocabulary: "
                             f"{sparse.vocabularies_differ(self._searcher.vocabulary, queries.vocabulary)} in that of "
                             "the queries", self.manifest.path)
        self._agreed = getattr(queries, "vocabulary", None)
        checks.refuse_other_making(self.manifest.fact("vectors", dict, default={}), queries.extra, self.manifest.path)

    def _check_dense(self, queries: DenseVectors) -> None:
        if self._searcher.dimensions != queries.dimensions:
            raise InputError(f"its documents have {self._searcher.dimensions} dimensions, the queries "
                             f"{queries.dimensions}", self.manifest.path)


def open_vectors(path: str | Path, engine: str, side: str) -> Vectors:
    """Open the vectors that an engine searches; InputError where ``path`` holds those of another kind."""
    kind = artifact.read(path).kind
    wanted, other = (dense.KIND, sparse.KIND) if engine in DENSE else (sparse.KIND, dense.KIND)
    if kind == other:
        advice = ("encode with --representation bottleneck, cls or mean" if engine in DENSE
                  else "encode without --representation, or use the engine faiss")
        held = "sparse" if engine in DENSE else "dense"
        raise InputError(f"holds {held} vectors, which the engine {engine} does not search: {advice}", path)
    if wanted == dense.KIND:
        return DenseVectors.open(path, side=side)
    if side == "queries":
        return SparseVectors.open(path, side=side)
    from lexmae.retrieval.stored import StoredVectors

    return StoredVectors.open(path, side=side)


def build(vectors: Vectors | str | Path, engine: str, output: str | Path, *, overwrite: bool = False,
          top_k: int | None = None, **settings: Any) -> Index:
    """Index document vectors (or the artifact that holds them).

    Args:
        top_k: keep only the ``top_k`` largest weights of each document; not for dense vectors.
        settings: of the engine's own ``build``.
    """
    builder, *_ = _engine(engine)
    artifact.refuse_existing(Path(output), overwrite)
    inputs = {}
    if not isinstance(vectors, Vectors):
        inputs["vectors"] = vectors
        vectors = open_vectors(vectors, engine, "docs")
    if top_k is not None:
        if engine in DENSE:
            raise InputError("top-k is for sparse vectors: dense ones have no terms to leave out")
        vectors = vectors.pruned(top_k)
    config: dict[str, Any] = {"engine": engine, "top_k": top_k, **settings}
    with artifact.create(output, KIND, inputs=inputs, config=config, overwrite=overwrite) as draft:
        draft.counts.update(rows=len(vectors))
        draft.extra.update(engine=engine, vectors=vectors.extra)
        if engine in DENSE:
            draft.extra.update(dimensions=vectors.dimensions)
        else:
            draft.counts.update(postings=vectors.n_postings)
            draft.extra.update(mean_active=round(vectors.mean_active, 3))
        builder(vectors, draft, **settings)
    return open_index(output)


def open_index(path: str | Path) -> Index:
    """Open a finished index; its manifest says of which engine."""
    return Index(verification.opened(path, KIND))


def default_threads() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(name: str) -> None:
    """InputError where an engine lacks what it needs on this machine."""
    _engine(name)[2]()


def _engine(name: str) -> _Engine:
    if name not in ENGINES:
        raise InputError(f"unknown engine '{name}': known are {', '.join(ENGINES)}")
    return ENGINES[name]()
