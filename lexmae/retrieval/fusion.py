"""Hybrid search: several runs of the same queries as one.

| method | a document's score for a query: sum over runs of weight times … | a run that lacks the document adds |
|---|---|---|
| ``rrf`` | 1 / (k + rank), ranks from 1 (Cormack et al., SIGIR 2009) | 0 |
| ``min-max`` | (score - lowest) / (highest - lowest) of the query in that run; 1 where all are equal | 0 |
| ``z-score`` | (score - mean) / standard deviation of the query in that run; 0 where all are equal | its lowest |

Normalisation is per query, over the documents that a run retrieved, so runs should be of the same depth. A run without
any document for a query adds nothing to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lexmae.errors import InputError
from lexmae.retrieval.runs import Run

RRF_K = 60  # of the paper


def fuse(runs: Sequence[Run], method: str = "rrf", *, weights: Sequence[float] | None = None, k: int = RRF_K,
         hits: int = 1000) -> Run:
    """The ``hits`` best documents of every query that any of the runs has; ties by document id.

    Args:
        method: a key of ``METHODS``.
        weights: one for each run; all 1 by default.
        k: of ``rrf``: the larger, the less the first ranks stand out.
    """
    if method not in METHODS:
        raise InputError(f"unknown way to fuse '{method}': known are {', '.join(METHODS)}")
    weights = [1.0] * len(runs) if weights is None else list(weights)
    if len(weights) != len(runs):
        raise InputError(f"{len(weights)} weights for {len(runs)} runs")
    if not np.isfinite(weights).all():
        raise InputError("weights must be finite numbers")
    if len(runs) < 2 or hits < 1 or k < 0:
        raise InputError("fusing needs two or more runs, at least 1 hit and k of at least 0")
    normalise = METHODS[method]
    fused: dict[str, list[tuple[str, float]]] = {}
    for query in dict.fromkeys(query for run in runs for query in run):
        total: dict[str, float] = {}
        base = 0.0
        for run, weight in zip(runs, weights, strict=True):
            if query not in run or not len(run.scores(query)):
                continue
            with np.errstate(over="ignore", invalid="ignore"):
                values, absent = normalise(run.scores(query).astype(np.float64), k)
                added = weight * (values - absent)
            if not np.isfinite(added).all():
                raise InputError(f"query {query!r}: its scores are too large to be normalised by {method}")
            base += weight * absent
            for name, value in zip(run.documents(query), added.tolist(), strict=True):
                total[name] = total.get(name, 0.0) + value
        fused[query] = [(name, base + value) for name, value in total.items()]
    return Run.from_pairs(fused).cut(hits)


def _reciprocal(scores: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    return 1.0 / (k + np.arange(1, len(scores) + 1)), 0.0


def _min_max(scores: np.ndarray, _: int) -> tuple[np.ndarray, float]:
    span = scores.max() - scores.min()
    return ((scores - scores.min()) / span if span else np.ones(len(scores))), 0.0


def _z_score(scores: np.ndarray, _: int) -> tuple[np.ndarray, float]:
    spread = scores.std()
    values = (scores - scores.mean()) / spread if spread else np.zeros(len(scores))
    return values, float(values.min())


# name → (scores of a ranking, k) → (values, value of a document that is not in it)
METHODS: dict[str, Callable[[np.ndarray, int], tuple[np.ndarray, float]]] = {
    "rrf": _reciprocal, "min-max": _min_max, "z-score": _z_score}
