"""Rankings of documents per query, in memory and as TREC run files.

Shapes: K documents ranked for one query.

Order everywhere: score, highest first; equal scores by document id, in the order of their code points.
"""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from pathlib import Path

import numpy as np

from lexmae import artifact
from lexmae.data.lines import ID_FORBIDDEN, bounded, open_bytes
from lexmae.data.passages import document_of
from lexmae.errors import InputError

DEFAULT_TAG = "lexmae"


class Run(Mapping[str, list[tuple[str, float]]]):
    """query id → [(document id, score), …], best first.

    Rankings are kept as arrays (document numbers and scores), 8 bytes an entry where scores are whole numbers, and
    turned into lists of pairs one query at a time, when asked for.

    Attributes:
        seconds: how long the search took, where an engine made the run.
    """

    seconds: float | None = None

    def __init__(self, documents: list[str] | None = None):
        """``documents``: the ids that ``add`` refers to by number."""
        self._documents = documents if documents is not None else []
        self._rankings: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def from_pairs(cls, rankings: Mapping[str, Iterable[tuple[str, float]]]) -> Run:
        """A run from pairs in any order."""
        run, number = cls(), {}
        for query, pairs in rankings.items():
            pairs = list(pairs)
            for name, _ in pairs:
                if name not in number:
                    number[name] = len(number)
                    run._documents.append(name)
            run.add(query, np.array([number[name] for name, _ in pairs], np.int32),
                    np.array([score for _, score in pairs], np.float64))
        return run

    def add(self, query: str, rows: np.ndarray, scores: np.ndarray, *, ordered: bool = False) -> None:
        """Add the ranking of ``query``: document numbers [K] and scores [K].

        The arrays are kept, not copied, where their types allow it.

        Args:
            ordered: they are in the run's order already.

        Raises:
            ValueError: the query is there already.
        """
        if query in self._rankings:
            raise ValueError(f"query '{query}' is ranked already")
        scores = _compact(np.asarray(scores))
        rows = np.asarray(rows, dtype=np.int32)
        if not ordered:
            order = self._order(rows, scores)
            rows, scores = rows[order], scores[order]
        self._rankings[query] = rows, scores

    def _order(self, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
        order = np.argsort(-scores.astype(np.float64), kind="stable")
        ranked = scores[order]
        bounds = np.concatenate([[0], np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, [len(ranked)]]).astype(np.int64)
        for group in np.flatnonzero(np.diff(bounds) > 1):
            start, end = bounds[group], bounds[group + 1]
            order[start:end] = sorted(order[start:end], key=lambda i: self._documents[rows[i]])
        return order

    def __getitem__(self, query: str) -> list[tuple[str, float]]:
        rows, scores = self._rankings[query]
        return list(zip([self._documents[i] for i in rows.tolist()], scores.tolist(), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rankings)

    def __len__(self) -> int:
        return len(self._rankings)

    def __contains__(self, query: object) -> bool:
        return query in self._rankings

    def documents(self, query: str) -> list[str]:
        """The ranked document ids of a query."""
        return [self._documents[i] for i in self._rankings[query][0].tolist()]

    def scores(self, query: str) -> np.ndarray:
        """The scores [K] of a query, in the order of ``documents``: int32 where all are whole numbers, else float64."""
        return self._rankings[query][1]

    @property
    def n_entries(self) -> int:
        """Number of (query, document) pairs."""
        return sum(len(rows) for rows, _ in self._rankings.values())

    def cut(self, depth: int) -> Run:
        """The first ``depth`` documents of every query, sharing the arrays."""
        return self._with({query: (rows[:depth], scores[:depth]) for query, (rows, scores) in self._rankings.items()})

    def without_self(self, passages: bool = False) -> Run:
        """The same rankings without the document that bears the query's own id, or where they are of ``passages``
        without any of it."""
        rankings = {}
        for query, (rows, scores) in self._rankings.items():
            names = (self._documents[i] for i in rows.tolist())
            keep = np.array([(document_of(name) if passages else name) != query for name in names], dtype=bool)
            rankings[query] = (rows, scores) if keep.all() else (rows[keep], scores[keep])
        return self._with(rankings)

    def _with(self, rankings: dict[str, tuple[np.ndarray, np.ndarray]]) -> Run:
        run = Run(self._documents)
        run._rankings, run.seconds = rankings, self.seconds
        return run


def _compact(scores: np.ndarray) -> np.ndarray:
    """int32 where nothing is lost by it, else float64."""
    if scores.dtype == np.int32:
        return scores
    wide = scores.astype(np.float64)
    if len(wide) and not np.isfinite(wide).all():
        raise ValueError("scores must be finite")
    if not len(wide) or (np.abs(wide).max() < 2**31 and (wide == np.rint(wide)).all()):
        return wide.astype(np.int32)
    return wide


def read_run(path: str | Path) -> Run:
    """Read a TREC run: lines ``qid Q0 docid rank score tag``, separated by spaces or tabs; ``.gz`` is unpacked.

    The scores order the documents, ranks are not read. The lines of a query need not stand together.

    Raises:
        InputError: a line has other than six columns or a score that is no finite number, or a document occurs
            twice for a query.
    """
    number: dict[bytes, int] = {}
    found: dict[bytes, tuple[array, array]] = {}
    with open_bytes(path) as file:
        for line, raw in enumerate(bounded(file, path), 1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            try:
                query, _, document, _, score, _ = raw.split()
                value = float(score)
            except ValueError:
                if not raw.split():
                    continue
                raise _bad_line(raw, path, line) from None
            if not isfinite(value):
                raise _bad_line(raw, path, line)
            pair = found.get(query)
            if pair is None:
                pair = found[query] = array("i"), array("d")
            pair[0].append(number.setdefault(document, len(number)))
            pair[1].append(value)
    run = Run([_decode(name, path) for name in number])
    for query in list(found):
        rows, scores = found.pop(query)
        _refuse_repeated(np.frombuffer(rows, np.int32), run, _decode(query, path), path)
        run.add(_decode(query, path), np.frombuffer(rows, np.int32), np.frombuffer(scores, np.float64))
    return run


def _refuse_repeated(rows: np.ndarray, run: Run, query: str, path: str | Path) -> None:
    ordered = np.sort(rows)
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(again):
        document = run._documents[ordered[again[0]]]
        raise InputError(f"document '{document}' occurs more than once for query '{query}'", path)


def _decode(name: bytes, path: str | Path) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"the id {name!r} is not UTF-8", path) from None


def _bad_line(raw: bytes, path: str | Path, line: int) -> InputError:
    parts = raw.decode("utf-8", errors="replace").split()
    if len(parts) != 6:
        return InputError(f"has {len(parts)} columns, a TREC run has 6 (qid Q0 docid rank score tag)", path, line)
    return InputError(f"the score '{parts[4]}' is not a finite number", path, line)


def write_run(path: str | Path, run: Mapping[str, Iterable[tuple[str, float]]], tag: str = DEFAULT_TAG) -> None:
    """Write a TREC run, all or nothing: ranks from 1, in the run's order.

    Whole scores are written as integers, others with the fewest digits that read back as the same number, so the
    order survives. ``run`` may be any mapping of pairs.

    Raises:
        InputError: an id is empty or contains white space, which the format cannot hold.
    """
    run = run if isinstance(run, Run) else Run.from_pairs(run)
    checked: set[str] = set()
    with artifact.atomic_file(path) as out:
        for query, pairs in run.items():
            for name in (query, *(document for document, _ in pairs)):
                if name not in checked:
                    _check_id(name)
                    checked.add(name)
            out.writelines(f"{query} Q0 {document} {rank} {score!r} {tag}\n"
                           for rank, (document, score) in enumerate(pairs, 1))


def check_tag(tag: str) -> None:
    """InputError for the name of a run that its last column cannot hold."""
    if tag.split() != [tag]:
        raise InputError(f"the tag {tag!r} is empty or contains white space and cannot stand in a TREC run")


def _check_id(name: str) -> None:
    if not name or ID_FORBIDDEN.search(name):
        raise InputError(f"the id {name!r} is empty or contains white space and cannot stand in a TREC run")
