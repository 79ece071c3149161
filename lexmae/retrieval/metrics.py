"""Effectiveness of runs (through pytrec_eval), their comparison, and the sparsity of vectors.

Shapes: Q judged queries, V vocabulary.

Every judged query counts: one without results scores 0. The order of the run is kept as it is, ties included:
trec_eval would order equal scores by descending document id, so it is given the ranks instead of the scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lexmae.errors import InputError
from lexmae.retrieval.runs import Run

if TYPE_CHECKING:
    from lexmae.retrieval.vectors import SparseVectors

DEFAULT = ("MRR@10", "nDCG@10", "Recall@50", "Recall@100", "Recall@1000", "MAP", "MRR@100")
Qrels = Mapping[str, Mapping[str, int]]
_CHUNK = 2000  # queries handed to pytrec_eval at a time


@dataclass(frozen=True)
class Result:
    """Measures of one run.

    Attributes:
        means: measure → mean over all judged queries.
        per_query: query → measure → value, judged queries in the order of the judgements.
        n_judged: judged queries.
        n_without_results: judged queries for which the run has no document (they score 0).
        n_without_relevant: judged queries that have no relevant document (they score 0).
        n_unjudged: queries of the run without judgements (left out).
    """

    means: dict[str, float]
    per_query: dict[str, dict[str, float]] = field(repr=False)
    n_judged: int
    n_without_results: int
    n_without_relevant: int
    n_unjudged: int


def evaluate(run: Mapping[str, Sequence[tuple[str, float]]], qrels: Qrels, measures: Sequence[str] = DEFAULT,
             relevance_level: int = 1) -> Result:
    """Score a run against judgements.

    Args:
        run: best document first, or pairs in any order as a plain mapping.
        qrels: query → document → relevance.
        measures: ``MRR@K``, ``nDCG@K``, ``Recall@K``, ``judged@K`` or ``MAP``. The rank is cut at K. nDCG takes the
            relevance as gain and divides by log2(rank + 1). judged@K is the share of the documents retrieved up to
            rank K that have a judgement of any grade: where it is low, the other measures know little.
        relevance_level: the least relevance that counts as relevant (nDCG does not use it).
    """
    if not qrels:
        raise InputError("there are no judgements to evaluate against")
    if relevance_level < 1:
        raise InputError(f"the relevance level must be at least 1, not {relevance_level}")
    run = run if isinstance(run, Run) else Run.from_pairs(run)
    wanted = {name: _parse(name) for name in measures}
    per_query: dict[str, dict[str, float]] = {}
    names = list(qrels)
    for start in range(0, len(names), _CHUNK):
        chunk = {query: {d: int(r) for d, r in qrels[query].items()} for query in names[start:start + _CHUNK]}
        per_query.update(_evaluate_chunk(run, chunk, wanted, relevance_level))
    means = {name: float(np.mean([values[name] for values in per_query.values()])) for name in measures}
    relevant = {query: max(qrels[query].values(), default=0) >= relevance_level for query in names}
    answered = {query for query in run if len(run.scores(query))}
    return Result(means, per_query, n_judged=len(names), n_without_results=len(set(names) - answered),
                  n_without_relevant=sum(not value for value in relevant.values()),
                  n_unjudged=len(set(run) - set(names)))


def _parse(name: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(MRR|nDCG|Recall|judged)@([1-9]\d*)|(MAP)", name)
    if not found:
        raise InputError(f"unknown measure '{name}': known are MRR@K, nDCG@K, Recall@K, judged@K and MAP")
    return ("MAP", None) if found[3] else (found[1], int(found[2]))


def _evaluate_chunk(run: Run, qrels: dict[str, dict[str, int]], wanted: dict[str, tuple[str, int | None]],
                    relevance_level: int) -> dict[str, dict[str, float]]:
    import pytrec_eval

    asked = {_trec_name(kind, cut) for kind, cut in wanted.values() if kind != "judged"}
    judge = pytrec_eval.RelevanceEvaluator(qrels, asked or {"map"}, relevance_level=relevance_level)
    scored = judge.evaluate({query: _by_rank(run.documents(query)) for query in qrels if query in run})
    nothing: dict[str, float] = {}
    return {query: {name: _judged(run, qrels, query, cut) if kind == "judged"
                    else _value(scored.get(query, nothing), kind, cut) for name, (kind, cut) in wanted.items()}
            for query in qrels}


def _judged(run: Run, qrels: dict[str, dict[str, int]], query: str, cut: int | None) -> float:
    first = run.documents(query)[:cut] if query in run else []
    return sum(document in qrels[query] for document in first) / max(len(first), 1)


def _by_rank(documents: list[str]) -> dict[str, float]:
    return {document: float(len(documents) - rank) for rank, document in enumerate(documents)}


def _trec_name(kind: str, cut: int | None) -> str:
    return {"MRR": "recip_rank", "MAP": "map", "nDCG": f"ndcg_cut.{cut}", "Recall": f"recall.{cut}"}[kind]


def _value(scored: Mapping[str, float], kind: str, cut: int | None) -> float:
    value = scored.get(_trec_name(kind, cut).replace(".", "_"), 0.0)
    if kind == "MRR" and value < 1 / (cut + 0.5):  # the first relevant document stands below the cut
        return 0.0
    return value


@dataclass(frozen=True)
class Comparison:
    """One measure of two runs over the same judged queries; differences are ``a - b``.

    Attributes:
        p_t: two-sided paired t-test.
        p_randomisation: two-sided paired randomisation test.
        better, worse: queries on which ``a`` is above or below ``b``.
    """

    measure: str
    mean_a: float
    mean_b: float
    p_t: float
    p_randomisation: float
    better: int
    worse: int


def compare(a: Result, b: Result, permutations: int = 10_000, seed: int = 42) -> list[Comparison]:
    """Test every measure the two results share for a difference of the means.

    The randomisation test flips the signs of the per-query differences at random; p is the share of flips whose
    mean is at least as far from 0 as the one observed, the observed one counted in (Smucker et al., CIKM 2007).

    Raises:
        InputError: the results are over different queries.
    """
    if a.per_query.keys() != b.per_query.keys():
        raise InputError("the runs were evaluated on different queries and cannot be compared query by query")
    found = []
    for name in (name for name in a.means if name in b.means):
        left = np.array([a.per_query[query][name] for query in a.per_query])
        right = np.array([b.per_query[query][name] for query in a.per_query])
        difference = left - right
        found.append(Comparison(name, a.means[name], b.means[name], _t_test(difference),
                                _randomisation_test(difference, permutations, seed),
                                int((difference > 0).sum()), int((difference < 0).sum())))
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of several tests, corrected so that the chance of any false alarm stays that of one test (Holm 1979).

    The i-th smallest of n is multiplied by n - i + 1, is never below a smaller one's, and never above 1.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for done, at in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, p_values[at] * (len(p_values) - done)))
        corrected[at] = highest
    return corrected


def _t_test(difference: np.ndarray) -> float:
    import scipy.stats

    if len(difference) < 2 or not difference.any():
        return 1.0
    if np.ptp(difference) == 0:
        return 0.0
    return float(scipy.stats.ttest_1samp(difference, 0.0).pvalue)


def _randomisation_test(difference: np.ndarray, permutations: int, seed: int) -> float:
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    draw = np.random.default_rng(seed)
    observed = abs(difference.sum()) * (1 - 1e-12)  # equal sums may differ in their last digits
    reached, step = 0, max(1, 4_000_000 // len(difference))
    for start in range(0, permutations, step):
        signs = draw.integers(0, 2, (min(step, permutations - start), len(difference)), dtype=np.int8)
        sums = 2 * (signs @ difference) - difference.sum()
        reached += int((np.abs(sums) >= observed).sum())
    return (reached + 1) / (permutations + 1)


def document_frequency(vectors: SparseVectors) -> np.ndarray:
    """Share of the texts in which each term is active, float64 [V]."""
    return np.bincount(vectors.indices, minlength=vectors.n_terms) / max(len(vectors), 1)


def flops(docs: SparseVectors, queries: SparseVectors) -> float:
    """Expected number of products in the score of a random query and a random document.

    ``Σ_v p_v(docs) · p_v(queries)`` with the shares of texts in which term v is active (Paria et al., ICLR 2020).
    """
    if docs.vocabulary != queries.vocabulary:
        raise InputError("documents and queries were encoded with different vocabularies")
    return float(document_frequency(docs) @ document_frequency(queries))


def sparsity(docs: SparseVectors, queries: SparseVectors | None = None) -> dict[str, float]:
    """Mean active terms of documents, and with ``queries`` theirs and the FLOPS of the pair."""
    found = {"docs mean active": docs.mean_active}
    if queries is not None:
        found |= {"queries mean active": queries.mean_active, "FLOPS": flops(docs, queries)}
    return found
