"""Documents ranked by their best passage (MaxP: Dai and Callan, SIGIR 2019), where documents were split into passages.

The result is exact: passages are retrieved until those that were not could change nothing.
"""

from __future__ import annotations

from lexmae.data.passages import document_of
from lexmae.errors import InputError
from lexmae.retrieval.engines import Index
from lexmae.retrieval.runs import Run
from lexmae.retrieval.vectors import SparseVectors

_FIRST = 2  # passages retrieved at first for each wanted document; twice as many where they do not suffice, and so on


def search(index: Index, queries: SparseVectors, hits: int = 1000, threads: int | None = None) -> Run:
    """The ``hits`` best documents of every query, each with the score of its best passage; ties by document id.

    Args:
        index: of passages ``DOCUMENT#0``, ``DOCUMENT#1``, …

    Raises:
        InputError: as ``Index.search``, and where a name of the index is no passage's.
    """
    if hits < 1:
        raise InputError(f"hits must be at least 1, not {hits}")
    found: dict[str, dict[str, float]] = {}
    asked, depth, seconds = queries, _FIRST * hits, 0.0
    while len(asked):
        run = index.search(asked, depth, threads)
        seconds += run.seconds or 0.0
        unfinished = []
        for row, query in enumerate(asked.ids):
            ranked = run[query]
            found[query] = _best_passages(ranked)
            sure = sum(score > ranked[-1][1] for score in found[query].values())
            if len(ranked) == depth and sure < hits:
                unfinished.append(row)
        asked, depth = asked.subset(unfinished), 2 * depth
    documents = Run.from_pairs({query: found[query].items() for query in queries.ids}).cut(hits)
    documents.seconds = seconds
    return documents


def _best_passages(ranked: list[tuple[str, float]]) -> dict[str, float]:
    """Document → score of its best passage, of a ranking of passages."""
    best: dict[str, float] = {}
    for name, score in ranked:
        document = document_of(name)
        if document == name:
            raise InputError(f"the index holds '{name}', which is no passage of a split document: search it without "
                             "--max-passage")
        best.setdefault(document, score)  # the first is the best
    return best
