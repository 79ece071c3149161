"""Search engines behind one interface: build an index from document vectors, search it with query vectors.

| engine | where it runs | what it needs |
|---|---|---|
| ``exact`` | in this process, compiled | nothing more |
| ``anserini`` | Lucene's impact index, in a Java process | ``pip install "lexmae[anserini]"`` |

An index is an artifact of kind ``index``; its manifest names its engine, so a search need not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lexmae import artifact
from lexmae.errors import InputError
from lexmae.retrieval.runs import Run
from lexmae.retrieval.vectors import SparseVectors

KIND = "index"


class Searcher(Protocol):
    """What an engine gives for a finished index folder."""

    vocabulary: list[str]

    def search(self, queries: SparseVectors, hits: int, threads: int) -> Run: ...


def _exact() -> tuple[Callable, Callable]:
    from lexmae.retrieval import exact

    return exact.build, exact.ExactIndex


def _anserini() -> tuple[Callable, Callable]:
    from lexmae.retrieval import anserini

    return anserini.build, anserini.AnseriniIndex


# name → () → (build(vectors, draft), open(folder)); engines are imported when they are used
ENGINES: dict[str, Callable[[], tuple[Callable, Callable]]] = {"exact": _exact, "anserini": _anserini}


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

    def __len__(self) -> int:
        return self.manifest.counts["rows"]

    def search(self, queries: SparseVectors, hits: int = 1000, threads: int | None = None) -> Run:
        """The ``hits`` best documents of every query, by dot product; ties by document id.

        Documents that share no term with the query are not found. ``run.seconds`` is the time the search took.

        Args:
            threads: all processors by default.

        Raises:
            InputError: the queries were encoded with another vocabulary or another scale than the documents.
        """
        if hits < 1:
            raise InputError(f"hits must be at least 1, not {hits}")
        self._check(queries)
        return self._searcher.search(queries, hits, threads or default_threads())

    def _check(self, queries: SparseVectors) -> None:
        if queries.vocabulary != self._searcher.vocabulary:
            raise InputError(f"its documents were encoded with another vocabulary ({len(self._searcher.vocabulary)} "
                             f"tokens) than the queries ({queries.n_terms} tokens)", self.manifest.path)
        made = self.manifest.extra.get("vectors", {})
        for key in ("tokenizer_hash", "scale"):
            if made.get(key) is not None and queries.extra.get(key) not in (None, made[key]):
                raise InputError(f"its documents were encoded with the {key} {made[key]}, "
                                 f"the queries with {queries.extra[key]}", self.manifest.path)


def build(vectors: SparseVectors | str | Path, engine: str, output: str | Path, *, overwrite: bool = False,
          top_k: int | None = None) -> Index:
    """Index document vectors (or the artifact that holds them).

    Args:
        top_k: keep only the ``top_k`` largest weights of each document.
    """
    builder, _ = _engine(engine)
    artifact.refuse_existing(Path(output), overwrite)
    inputs = {}
    if not isinstance(vectors, SparseVectors):
        inputs["vectors"] = vectors
        vectors = SparseVectors.open(vectors, side="docs")
    if top_k is not None:
        vectors = vectors.pruned(top_k)
    config: dict[str, Any] = {"engine": engine, "top_k": top_k}
    with artifact.create(output, KIND, inputs=inputs, config=config, overwrite=overwrite) as draft:
        draft.counts.update(rows=len(vectors), postings=len(vectors.indices))
        draft.extra.update(engine=engine, vectors=vectors.extra, mean_active=round(vectors.mean_active, 3))
        builder(vectors, draft)
    return open_index(output)


def open_index(path: str | Path) -> Index:
    """Open a finished index; its manifest says of which engine."""
    return Index(artifact.read(path, KIND))


def default_threads() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _engine(name: str) -> tuple[Callable, Callable]:
    if name not in ENGINES:
        raise InputError(f"unknown engine '{name}': known are {', '.join(ENGINES)}")
    return ENGINES[name]()
