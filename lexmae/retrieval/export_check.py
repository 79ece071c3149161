"""Reads exported files back, as the other engine would, and compares them with the vectors they were made of.

A reader for each format parses the files anew; nothing is shared with the writer but the names of files. The scores of
all texts for a sample of queries must be the same integers. What an engine will lose when it stores the weights is
measured too: Lucene's features (``rank_features``, ``sparse_vector``) keep 9 significant bits of a float, cut off
below, and Seismic 11, rounded.

Shapes: R texts, V vocabulary, S sampled queries.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lexmae.cli import progress
from lexmae.errors import InputError
from lexmae.retrieval.vectors import SparseVectors

SAMPLE = 16  # queries
_CHUNK = 4096  # texts compared together
Row = tuple[str, Mapping[str, int]]


def check(vectors: SparseVectors, folder: Path, layout: str, side: str, sample: int = SAMPLE) -> dict[str, Any]:
    """Compare what lies in ``folder`` with ``vectors``.

    Args:
        sample: how many of the texts, drawn with a fixed seed, serve as queries.

    Returns:
        ``texts`` and ``queries`` that were compared; of the weights as the engine stores them: ``weights_changed`` (a
        share), ``weight_error`` and ``score_error`` (the largest relative ones).

    Raises:
        InputError: a text is missing, out of order, or has another score.
    """
    import scipy.sparse

    drawn = np.random.default_rng(0).choice(len(vectors), min(sample, len(vectors)), replace=False)
    queries = vectors.subset(np.sort(drawn).tolist()).to_scipy().T.tocsr()  # [V, S]
    names = _names(vectors, layout)
    number = {names[term]: term for term in np.unique(vectors.indices)[::-1].tolist()}
    rows, at, loss = _READERS[layout](folder, side, vectors), 0, _Loss(_STORED.get(layout))
    with progress(total=len(vectors), desc="read back", unit="text") as bar:
        while chunk := list(islice(rows, _CHUNK)):
            ids = list(vectors.ids[at:at + len(chunk)])
            if [name for name, _ in chunk] != ids:
                raise InputError(f"read back, the texts {at} to {at + len(chunk) - 1} are not those that were written",
                                 folder)
            indptr = np.concatenate([[0], np.cumsum([len(row) for _, row in chunk])])
            terms = np.fromiter((_term(number, token, folder) for _, row in chunk for token in row), np.int64)
            weights = np.fromiter((weight for _, row in chunk for weight in row.values()), np.int64)
            shape = len(chunk), vectors.n_terms
            read = (scipy.sparse.csr_array((weights, terms, indptr), shape=shape) @ queries).toarray()  # [R, S]
            part = slice(vectors.indptr[at], vectors.indptr[at + len(chunk)])
            made = scipy.sparse.csr_array((vectors.weights[part].astype(np.int64), vectors.indices[part],
                                           vectors.indptr[at:at + len(chunk) + 1] - part.start), shape=shape)
            scores = (made @ queries).toarray()
            if not np.array_equal(read, scores):
                row, query = np.argwhere(read != scores)[0]
                raise InputError(f"read back, '{ids[row]}' scores {read[row, query]} instead of {scores[row, query]}",
                                 folder)
            loss.add(made, queries, scores)
            at += len(chunk)
            bar.update(len(chunk))
    if at != len(vectors):
        raise InputError(f"read back, {at} of {len(vectors)} texts are there", folder)
    return {"texts": at, "queries": len(drawn), **loss.figures()}


def nine_bits(weights: np.ndarray) -> np.ndarray:
    """Weights as Lucene's ``FeatureField`` keeps them: float32 without the lower 15 bits."""
    return ((weights.astype(np.float32).view(np.int32) >> 15) << 15).view(np.float32)


def half_float(weights: np.ndarray) -> np.ndarray:
    """Weights as 16-bit floats."""
    return np.minimum(weights, 65504).astype(np.float16).astype(np.float32)


_STORED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "opensearch": nine_bits, "elasticsearch": nine_bits, "seismic": half_float}


class _Loss:
    """What storing weights as ``stored`` gives does to them and to scores."""

    def __init__(self, stored: Callable[[np.ndarray], np.ndarray] | None):
        self._stored = stored
        self._seen = self._changed = 0
        self._weight = self._score = 0.0

    def add(self, made: Any, queries: Any, scores: np.ndarray) -> None:
        """Documents int64 [R, V], queries [V, S], their scores [R, S]."""
        self._seen += len(made.data)
        if self._stored is None or not len(made.data):
            return
        kept = made.astype(np.float64)
        kept.data = self._stored(made.data).astype(np.float64)
        self._changed += int((kept.data != made.data).sum())
        self._weight = max(self._weight, float((np.abs(kept.data - made.data) / made.data).max()))
        error = np.abs((kept @ queries).toarray() - scores) / np.maximum(scores, 1)
        self._score = max(self._score, float(error.max(initial=0)))

    def figures(self) -> dict[str, float]:
        return {"weights_changed": self._changed / max(self._seen, 1), "weight_error": self._weight,
                "score_error": self._score}


def _names(vectors: SparseVectors, layout: str) -> Sequence[str]:
    """What the format calls the terms."""
    by_number = layout in ("opensearch", "elasticsearch", "csr")
    return list(map(str, range(vectors.n_terms))) if by_number else vectors.vocabulary


def _term(number: Mapping[str, int], token: str, folder: Path) -> int:
    if token not in number:
        raise InputError(f"read back, there is a term {token!r} that no text has", folder)
    return number[token]


def _objects(folder: Path, pattern: str) -> Iterator[dict]:
    for file in sorted(folder.glob(pattern)):
        with open(file, encoding="utf-8", newline="\n") as lines:
            yield from map(json.loads, lines)


def _read_anserini(folder: Path, side: str, _: SparseVectors) -> Iterator[Row]:
    if side == "docs":
        for row in _objects(folder, "docs-*.jsonl"):
            yield row["id"], {token: int(weight) for token, weight in row["vector"].items()}
        return
    with open(folder / "topics.tsv", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            name, _, text = line.rstrip("\n").partition("\t")
            yield name, Counter(text.split())


def _read_seismic(folder: Path, side: str, _: SparseVectors) -> Iterator[Row]:
    for row in _objects(folder, "docs-*.jsonl" if side == "docs" else "queries.jsonl"):
        yield row["id"], row["vector"]


def _read_bulk(folder: Path, side: str, _: SparseVectors) -> Iterator[Row]:
    if side == "docs":
        lines = _objects(folder, "bulk-*.ndjson")
        for action in lines:
            yield action["index"]["_id"], next(lines)["lexicon"]
        return
    for row in _objects(folder, "queries.jsonl"):
        yield row["id"], row.get("query_tokens") or row["query_vector"]


def _read_csr(folder: Path, _: str, vectors: SparseVectors) -> Iterator[Row]:
    import scipy.sparse

    matrix = scipy.sparse.load_npz(folder / "vectors.npz")
    if json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")) != vectors.vocabulary:
        raise InputError("read back, the vocabulary is another", folder)
    names = (folder / "ids.txt").read_text(encoding="utf-8").split("\n")[:-1]
    if len(names) != matrix.shape[0]:
        raise InputError(f"read back, there are {len(names)} ids for {matrix.shape[0]} rows", folder)
    for row, name in enumerate(names):
        part = slice(matrix.indptr[row], matrix.indptr[row + 1])
        yield name, dict(zip(map(str, matrix.indices[part].tolist()), matrix.data[part].tolist(), strict=True))


_READERS: dict[str, Callable[[Path, str, SparseVectors], Iterator[Row]]] = {
    "anserini": _read_anserini, "opensearch": _read_bulk, "elasticsearch": _read_bulk, "seismic": _read_seismic,
    "csr": _read_csr}
