"""Measures against figures worked out by hand and against a plain Python implementation."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import pytrec_eval
import scipy.stats

from lexmae.errors import InputError
from lexmae.retrieval import metrics
from lexmae.retrieval.metrics import compare, evaluate
from lexmae.retrieval.runs import Run
from lexmae.retrieval.vectors import SparseVectors, quantise


def plain(run, qrels, measure):
    """Mean over all judged queries, straight from the definitions."""
    kind, cut = (measure.split("@") + [None])[:2] if "@" in measure else (measure, None)
    values = []
    for query, judged in qrels.items():
        ranking = [d for d, _ in sorted(run.get(query, []), key=lambda p: (-p[1], p[0]))][:int(cut) if cut else None]
        hits = [judged.get(d, 0) > 0 for d in ranking]
        total = sum(r > 0 for r in judged.values())
        if kind == "MRR":
            values.append(next((1 / rank for rank, hit in enumerate(hits, 1) if hit), 0.0))
        elif kind == "Recall":
            values.append(sum(hits) / total if total else 0.0)
        elif kind == "MAP":
            precisions = [sum(hits[:i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit]
            values.append(sum(precisions) / total if total else 0.0)
        else:
            def gain(relevances):
                return sum(r / math.log2(rank + 1) for rank, r in enumerate(relevances, 1))
            ideal = gain(sorted((max(r, 0) for r in judged.values()), reverse=True)[:int(cut)])
            values.append(gain([max(judged.get(d, 0), 0) for d in ranking]) / ideal if ideal else 0.0)
    return sum(values) / len(values)


@pytest.fixture
def chance_data():
    chance = random.Random(3)
    qrels = {f"q{i}": {f"d{chance.randrange(60)}": chance.choice([0, 1, 1, 2, 3])
                       for _ in range(chance.randrange(1, 9))} for i in range(80)}
    run = {f"q{i}": [(f"d{j}", chance.randrange(12)) for j in chance.sample(range(60), 40)]
           for i in range(90) if i % 7}
    return run, qrels


@pytest.mark.parametrize("measure", [*metrics.DEFAULT, "MRR@1", "nDCG@5", "Recall@3"])
def test_agrees_with_plain_python_ties_and_missing_queries_included(chance_data, measure):
    run, qrels = chance_data
    result = evaluate(run, qrels, [measure])
    assert result.means[measure] == pytest.approx(plain(run, qrels, measure), abs=1e-9)
    assert list(result.per_query) == list(qrels)


def test_counts(chance_data):
    run, qrels = chance_data
    result = evaluate({**run, "q1": []}, qrels)
    assert (result.n_judged, result.n_unjudged) == (80, sum(i % 7 > 0 for i in range(80, 90)))
    assert result.n_without_results == 12 + 1
    assert result.n_without_relevant == sum(max(j.values()) == 0 for j in qrels.values())


def test_by_hand():
    run = {"q1": [("a", 3.0), ("b", 2.0), ("c", 1.0)], "q2": [("x", 9.0)]}
    qrels = {"q1": {"b": 1, "z": 1}, "q2": {"y": 1}, "q3": {"a": 1}}
    result = evaluate(run, qrels)
    assert result.per_query["q1"]["MRR@10"] == pytest.approx(1 / 2)
    assert result.per_query["q1"]["MAP"] == pytest.approx(1 / 4)
    assert result.per_query["q1"]["Recall@50"] == pytest.approx(1 / 2)
    assert result.per_query["q1"]["nDCG@10"] == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert result.means["MRR@10"] == pytest.approx(1 / 6)
    assert result.n_without_results == 1


@pytest.mark.parametrize(("rank", "expected"), [(1, 1.0), (9, 1 / 9), (10, 0.1), (11, 0.0), (100, 0.0)])
def test_reciprocal_rank_is_cut_at_ten(rank, expected):
    run = {"q": [(f"d{i}", -i) for i in range(1, 120)]}
    result = evaluate(run, {"q": {f"d{rank}": 1}})
    assert result.means["MRR@10"] == pytest.approx(expected)
    assert result.means["MRR@100"] == pytest.approx(1 / rank)


def test_equal_scores_are_ranked_by_ascending_docid():
    result = evaluate({"q": [("b", 1), ("a", 1)]}, {"q": {"a": 1}})
    assert result.means["MRR@10"] == 1.0


def test_no_relevance_level_below_one():
    with pytest.raises(InputError, match="relevance level must be at least 1, not 0"):
        evaluate({"q": [("a", 1.0)]}, {"q": {"a": 1}}, ["MRR@10"], relevance_level=0)


def test_relevance_level():
    run, qrels = {"q": [("a", 2), ("b", 1)]}, {"q": {"a": 1, "b": 2}}
    assert evaluate(run, qrels, ["MRR@10"]).means["MRR@10"] == 1.0
    assert evaluate(run, qrels, ["MRR@10"], relevance_level=2).means["MRR@10"] == 0.5


def test_many_queries_go_in_chunks(monkeypatch, chance_data):
    whole = evaluate(*chance_data).means
    monkeypatch.setattr(metrics, "_CHUNK", 7)
    assert evaluate(*chance_data).means == pytest.approx(whole)


@pytest.mark.parametrize("name", ["MRR", "ndcg@10", "MAP@5", "Recall@0", "P@3"])
def test_unknown_measures(name):
    with pytest.raises(InputError, match="unknown measure"):
        evaluate({"q": [("a", 1)]}, {"q": {"a": 1}}, [name])


def test_no_judgements():
    with pytest.raises(InputError, match="no judgements"):
        evaluate({"q": [("a", 1)]}, {})


def results(left, right):
    def result(values):
        return metrics.Result({"M": float(np.mean(values))}, {str(i): {"M": v} for i, v in enumerate(values)},
                              len(values), 0, 0, 0)
    return result(left), result(right)


def test_compare_against_all_sign_flips():
    left, right = [0.9, 0.8, 0.3, 1.0, 0.5, 0.7, 0.2, 0.6], [0.5, 0.9, 0.1, 0.4, 0.5, 0.6, 0.1, 0.2]
    difference = np.array(left) - np.array(right)
    flips = [abs((np.array(s) * difference).sum()) for s in itertools.product([1, -1], repeat=8)]
    exact = np.mean([f >= abs(difference.sum()) - 1e-9 for f in flips])
    found = compare(*results(left, right))[0]
    assert found.p_randomisation == pytest.approx(exact, abs=0.01)
    assert found.p_t == pytest.approx(scipy.stats.ttest_rel(left, right).pvalue)
    assert (found.better, found.worse) == (6, 1)
    assert compare(*results(left, right))[0] == found


def test_compare_equal_and_foreign_runs():
    same = compare(*results([0.5, 0.1], [0.5, 0.1]))[0]
    assert same.p_t == same.p_randomisation == 1.0
    with pytest.raises(InputError, match="different queries"):
        compare(results([0.5], [0.5])[0], results([0.5, 1], [0.5, 1])[1])


def test_flops_is_the_mean_number_of_shared_terms():
    rng = np.random.default_rng(0)
    def made(n):
        dense = (rng.random((n, 30)) < 0.2) * rng.random((n, 30))
        return SparseVectors([str(i) for i in range(n)], *quantise(dense, 0), [str(i) for i in range(30)])
    docs, queries = made(40), made(9)
    shared = (docs.to_scipy().toarray() > 0).astype(int) @ (queries.to_scipy().toarray() > 0).astype(int).T
    assert metrics.flops(docs, queries) == pytest.approx(shared.mean())
    found = metrics.sparsity(docs, queries)
    assert found["docs mean active"] == pytest.approx((docs.to_scipy().toarray() > 0).sum(1).mean())
    queries.vocabulary = ["other"] * 30
    with pytest.raises(InputError, match="different vocabularies"):
        metrics.flops(docs, queries)


def test_a_run_object_is_taken_as_it_is(chance_data):
    run, qrels = chance_data
    assert evaluate(Run.from_pairs(run), qrels).means == evaluate(run, qrels).means


# -------------------------------------------------------------------------------------------------- trec_eval, tests


@pytest.mark.parametrize("level", [1, 2])
def test_every_measure_is_trec_evals(chance_data, level):
    """pytrec_eval's own numbers on the raw scores, all different; queries without results count 0 here and there."""
    run, qrels = chance_data
    chance = random.Random(4)
    run = {q: dict(zip([d for d, _ in pairs], chance.sample(range(10_000), len(pairs)), strict=True))
           for q, pairs in run.items()}
    names = {"nDCG@10": "ndcg_cut_10", "nDCG@5": "ndcg_cut_5", "Recall@5": "recall_5", "Recall@100": "recall_100",
             "MAP": "map", "MRR@1000": "recip_rank"}
    judge = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.5,10", "recall.5,100", "map", "recip_rank"},
                                           relevance_level=level)
    theirs = judge.evaluate({q: {d: float(s) for d, s in scores.items()} for q, scores in run.items()})
    ours = evaluate({q: list(scores.items()) for q, scores in run.items()}, qrels, list(names), level)
    for name, trec in names.items():
        for query in qrels:
            expected = theirs[query][trec] if query in theirs else 0.0
            assert ours.per_query[query][name] == pytest.approx(expected, abs=1e-6), (name, query)
        assert round(ours.means[name], 4) == round(sum(v[trec] for v in theirs.values()) / len(qrels), 4)


def test_mrr_at_ten_is_trec_evals_reciprocal_rank_of_the_first_ten(chance_data):
    run, qrels = chance_data
    order = {q: sorted(pairs, key=lambda p: (-p[1], p[0]))[:10] for q, pairs in run.items()}
    judge = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"})
    theirs = judge.evaluate({q: {d: float(10 - i) for i, (d, _) in enumerate(pairs)} for q, pairs in order.items()})
    expected = sum(values["recip_rank"] for values in theirs.values()) / len(qrels)
    assert evaluate(run, qrels, ["MRR@10"]).means["MRR@10"] == pytest.approx(expected, abs=1e-6)


def test_judged_by_hand():
    run = {"q1": [("a", 3), ("b", 2), ("c", 1)], "q2": [("x", 1)]}
    qrels = {"q1": {"b": 0, "c": 2, "z": 1}, "q2": {"y": 1}, "q3": {"a": 1}}
    result = evaluate(run, qrels, ["judged@1", "judged@2", "judged@10"])
    assert result.per_query["q1"] == {"judged@1": 0, "judged@2": 1 / 2, "judged@10": pytest.approx(2 / 3)}
    assert result.means["judged@10"] == pytest.approx((2 / 3 + 0 + 0) / 3)


def test_graded_judgements_as_trec_dl_has_them():
    """Grades 0 to 3: relevant from 2 on, all of them gain for nDCG."""
    run = {"q": [("one", 4), ("zero", 3), ("two", 2), ("three", 1)]}
    qrels = {"q": {"zero": 0, "one": 1, "two": 2, "three": 3}}
    found = evaluate(run, qrels, ["MRR@10", "Recall@3", "MAP", "nDCG@10"], relevance_level=2).means
    gain = 1 + 0 + 2 / math.log2(4) + 3 / math.log2(5)
    ideal = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert found == pytest.approx({"MRR@10": 1 / 3, "Recall@3": 1 / 2, "MAP": (1 / 3 + 2 / 4) / 2,
                                   "nDCG@10": gain / ideal})


@pytest.mark.parametrize(("given", "expected"), [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.5, 0.9], [1.0, 1.0]), ([0.02], [0.02]), ([], []),
    ([0.0001, 0.2, 0.049, 0.012], [0.0004, 0.2, 0.098, 0.036])])
def test_holm_by_hand(given, expected):
    assert metrics.holm(given) == pytest.approx(expected)
