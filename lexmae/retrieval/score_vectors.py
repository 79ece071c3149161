"""Scores that are dot products of stored vectors, sparse or dense: a bi-encoder as the teacher, or as a second ranking.

A sentence encoder that was trained on much more than the collection has can be a better teacher than a cross-encoder
that has to be trained first. Its vectors come from ``tools/encode.py``.

Where documents are split into passages, the vectors are those of passages, and the score of a document is that of its
best passage.

Shapes: K documents of one query, V vocabulary.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import issparse

from lexmae import artifact
from lexmae.cli import progress, say
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.retrieval import blocks, checks, dense, reports
from lexmae.retrieval.dense import DenseVectors
from lexmae.retrieval.engines import Vectors
from lexmae.retrieval.scored import (
    Item,
    Negatives,
    Reranking,
    ScoreConfig,
    Work,
    best_scores,
    join,
    open_shards,
    part_path,
    rows_of,
)
from lexmae.retrieval.vectors import SCALE, SparseVectors, vocabularies_differ

_BLOCK = 4096  # queries written at a time


def score(docs: str | Path, queries: str | Path, shards: str | Path, output: str | Path, config: ScoreConfig,
          scale: float = 1.0, *, negatives: str | Path | None = None, run: str | Path | None = None,
          overwrite: bool = False) -> dict[str, Any]:
    """Write ``output``: the file ``negatives`` with scores, or the TREC run ``run`` ranked anew. On one process.

    Args:
        docs, queries: vectors of both sides, made by one model; of sparse ones the true weights count, not the
            whole numbers that they are stored as.
        scale: factor of the dot products. Distillation compares their softmax; cosines between -1 and 1 need one of
            about 20, what sentence encoders are trained with.

    Returns:
        Numbers of queries and of their documents, and the seconds, as ``score.score``.

    Raises:
        InputError: vectors, shards, split or source do not exist or do not belong together, a text has no vector, or
            ``output`` exists.
    """
    output, source = Path(output), Path(negatives or run)
    opened = open_shards(shards, config.split)
    reports.refuse_existing(output, overwrite=overwrite)
    product = _product(_open(docs, "docs"), _open(queries, "queries"), docs, queries)
    work = (Negatives if negatives else Reranking)(source, opened, config)
    partial = artifact.partial_path(output)
    start = time.perf_counter()
    with blocks.writing(output, overwrite):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _write(work, opened, config.split, lambda query, names: scale * product(query, names), partial)
            join(partial, output, checksummed=bool(negatives))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    documents = sum(len(item.units) for item in work.items)
    say(f"wrote {output}: {len(work.items)} queries, {documents} documents")
    return {"queries": len(work.items), "documents": documents, "queries_here": len(work.items),
            "seconds": time.perf_counter() - start, "ranks": 1}


def _write(work: Work, shards: Shards, split: str, scores_of: Callable[[str, list[str]], np.ndarray],
           partial: Path) -> None:
    """The parts of the output; ``scores_of`` a query's id and K ids of texts gives their scores [K]."""
    table, items = shards.queries(split), work.items

    def best(item: Item) -> np.ndarray:
        rows, sizes = rows_of(shards, item.units.astype(np.int64))
        return best_scores(scores_of(table.id(item.query), shards.docs.ids(rows)), sizes)

    with progress(total=len(items), desc="score", unit="queries") as bar:
        for block, first in enumerate(range(0, len(items), _BLOCK)):
            numbers, found = range(first, min(first + _BLOCK, len(items))), []
            for number in numbers:
                found.append(best(items[number]))
                bar.update(1)
            work.write(part_path(partial, block), numbers, found)


def _open(path: str | Path, side: str) -> Vectors:
    kind = DenseVectors if artifact.read(path).kind == dense.KIND else SparseVectors
    return kind.open(path, side=side)


def _product(docs: Vectors, queries: Vectors, docs_path: str | Path,
             queries_path: str | Path) -> Callable[[str, list[str]], np.ndarray]:
    """What gives the dot products float64 [K] of a query and K texts, by their ids."""
    if type(docs) is not type(queries):
        raise InputError("one is of dense vectors, the other of sparse ones", f"{docs_path}, {queries_path}")
    checks.refuse_other_making(docs.extra, queries.extra, docs_path)
    if isinstance(docs, DenseVectors):
        if docs.dimensions != queries.dimensions:
            raise InputError(f"has {queries.dimensions} dimensions, the documents have {docs.dimensions}", queries_path)
        matrix, asked, unit = docs.matrix, queries.matrix, 1.0
    else:
        if docs.vocabulary != queries.vocabulary:
            differ = vocabularies_differ(docs.vocabulary, queries.vocabulary)
            raise InputError(f"its vocabulary is another: {differ} in that of the queries", docs_path)
        matrix, asked = docs.to_scipy(), queries.to_scipy()
        unit = _scale(docs, docs_path) * _scale(queries, queries_path)
    doc_row, query_row = ({name: row for row, name in enumerate(vectors.ids)} for vectors in (docs, queries))

    def product(query: str, names: list[str]) -> np.ndarray:
        try:
            row, wanted = query_row[query], [doc_row[name] for name in names]
        except KeyError as error:
            raise InputError(f"has no vector of '{error.args[0]}'",
                             docs_path if query in query_row else queries_path) from None
        found = matrix[wanted].astype(np.float64) @ asked[[row]].astype(np.float64).T / unit
        return (found.toarray() if issparse(found) else found)[:, 0]

    return product


def _scale(vectors: SparseVectors, path: str | Path) -> float:
    """What the weights were multiplied by when they became whole numbers."""
    value = vectors.extra.get("scale", SCALE)
    if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InputError(f"scale: a number above 0 is needed, not {value!r}", path)
    return float(value)
