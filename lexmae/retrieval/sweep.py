"""The paper's trade-off: pruned documents and queries, size of the index, speed, and effectiveness, in one table.

Every number of terms kept per document gets an index of its own, in a folder that is removed afterwards; every number
of terms kept per query is searched in each of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lexmae.cli import say
from lexmae.errors import InputError
from lexmae.retrieval import engines, metrics
from lexmae.retrieval.metrics import Qrels
from lexmae.retrieval.vectors import SparseVectors


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        top_k_docs, top_k_queries: terms kept; None keeps all.
        terms_docs, terms_queries: the mean number of terms that are left.
        megabytes: size of the index on disk, in 10^6 bytes.
        queries_per_second: of the fastest of the repeated searches.
        means: measure → mean.
    """

    top_k_docs: int | None
    top_k_queries: int | None
    terms_docs: float
    terms_queries: float
    megabytes: float
    queries_per_second: float
    means: dict[str, float]


def sweep(docs: SparseVectors, queries: SparseVectors, qrels: Qrels, *, top_k_docs: Sequence[int],
          top_k_queries: Sequence[int] = (), engine: str = "exact", measures: Sequence[str] = ("MRR@10",),
          hits: int = 1000, threads: int = 1, relevance_level: int = 1, repeats: int = 3,
          folder: str | Path | None = None) -> list[Point]:
    """Measure every combination; all terms of documents, and of queries, are always among them.

    Args:
        top_k_docs, top_k_queries: numbers of terms to keep.
        repeats: searches of each setting.
        folder: for the indexes; the system's temporary folder by default.

    Raises:
        InputError: the engine does not search sparse vectors, or a number is below 1.
    """
    if engine not in engines.SPARSE:
        raise InputError(f"a sweep prunes sparse vectors, which the engine {engine} does not search")
    if min([*top_k_docs, *top_k_queries, hits, threads, repeats]) < 1:
        raise InputError("terms to keep, hits, threads and repeats must be at least 1")
    points = []
    for kept_docs in _levels(top_k_docs):
        short = docs if kept_docs is None else docs.pruned(kept_docs)
        with tempfile.TemporaryDirectory(dir=folder, prefix="lexmae-sweep-") as work:
            index = engines.build(short, engine, Path(work) / "index")
            size = sum(file.stat().st_size for file in Path(work).rglob("*") if file.is_file()) / 1e6
            for kept_queries in _levels(top_k_queries):
                asked = queries if kept_queries is None else queries.pruned(kept_queries)
                found = [index.search(asked, hits, threads) for _ in range(repeats)]
                rate = len(asked) / max(min(run.seconds for run in found), 1e-9)
                means = metrics.evaluate(found[0], qrels, measures, relevance_level).means
                points.append(Point(kept_docs, kept_queries, round(short.mean_active, 2), round(asked.mean_active, 2),
                                    round(size, 3), round(rate, 1), means))
                say(f"documents {_kept(kept_docs)}, queries {_kept(kept_queries)}: {rate:,.0f} queries/s, "
                    f"{size:.1f} MB, {', '.join(f'{name} {value:.4f}' for name, value in means.items())}")
    return points


def _levels(numbers: Sequence[int]) -> list[int | None]:
    """Ascending, all terms last."""
    return [*sorted(set(numbers)), None]


def _kept(number: int | None) -> str:
    return "all" if number is None else str(number)


def markdown(points: Sequence[Point]) -> str:
    """The table in Markdown."""
    measures = list(points[0].means)
    head = ["terms kept: docs", "queries", "terms/doc", "terms/query", "index MB", "queries/s", *measures]
    rows = [[_kept(p.top_k_docs), _kept(p.top_k_queries), f"{p.terms_docs:.1f}", f"{p.terms_queries:.1f}",
             f"{p.megabytes:.1f}", f"{p.queries_per_second:.0f}", *(f"{p.means[name]:.4f}" for name in measures)]
            for p in points]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]]) + "\n"


def figures(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The points for JSON."""
    return [asdict(point) for point in points]
