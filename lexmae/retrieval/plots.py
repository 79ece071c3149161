"""Plots of what the commands measure. Needs ``pip install "lexmae[plots]"``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from lexmae import artifact
from lexmae.retrieval.sweep import Point

HINT = 'no plot, since matplotlib is not installed: pip install "lexmae[plots]"'


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        return importlib.util.find_spec("matplotlib") is not None
    except ValueError:
        return False


def trade_off(points: Sequence[Point], path: str | Path, engine: str = "") -> None:
    """Write a PNG of the first measure against queries/s and against the size of the index: a line for each number of
    terms kept per query, a dot for each number kept per document."""
    from matplotlib.figure import Figure

    measure = next(iter(points[0].means))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for kept in dict.fromkeys(point.top_k_queries for point in points):
        line = [point for point in points if point.top_k_queries == kept]
        values = [point.means[measure] for point in line]
        label = "all terms of a query" if kept is None else f"{kept} terms of a query"
        left.plot([point.queries_per_second for point in line], values, marker="o", label=label)
        right.plot([point.megabytes for point in line], values, marker="o", label=label)
    for point in (point for point in points if point.top_k_queries is None):
        text = "all" if point.top_k_docs is None else str(point.top_k_docs)
        for axes, x in ((left, point.queries_per_second), (right, point.megabytes)):
            axes.annotate(text, (x, point.means[measure]), textcoords="offset points", xytext=(4, 5), fontsize=8)
    left.set(xlabel="queries per second", ylabel=measure, xscale="log")
    right.set(xlabel="index, MB")
    left.legend(fontsize=8)
    figure.suptitle(f"Terms kept per document (at the dots){f', engine {engine}' if engine else ''}", fontsize=10)
    with artifact.atomic_file(path, "wb") as out:
        figure.savefig(out, format="png", dpi=150)
