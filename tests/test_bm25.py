"""BM25: analysis like Lucene's, rankings against the formula in plain Python, figures against Anserini's."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from lexmae.data.corpus import Corpus, Passage
from lexmae.errors import InputError
from lexmae.retrieval.bm25 import Analyzer, Bm25, best, name_parts, suited_tokens, words
from lexmae.retrieval.metrics import evaluate
from lexmae.retrieval.mining import bm25_run

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize(("text", "expected"), [
    ("The U.S.A.'s can't", ["The", "U.S.A", "s", "can't"]), ("3,500.25 units; x", ["3,500.25", "units", "x"]),
    ("numpy.linalg.norm_x a/b e-mail", ["numpy.linalg.norm_x", "a", "b", "e", "mail"]), ("__ _a", ["_a"]),
    ("日本 café cafe\u0301", ["日", "本", "café", "cafe\u0301"]), ("1.x 2.5", ["1", "x", "2.5"]), ("", [])])
def test_words_break_like_lucenes(text, expected):
    assert words(text) == expected


def test_name_parts():
    assert name_parts("numpy.linalg.parseHTTPResponse2x load_csv's") == [
        "numpy", "linalg", "parse", "HTTP", "Response", "2", "x", "load", "csv"]


def test_analysis():
    assert Analyzer()("The dog's running, and it IS relational!") == ["dog", "run", "relat"]
    assert Analyzer("names")("json.loadFile") == ["json", "load", "file"]
    with pytest.raises(InputError, match="unknown way"):
        Analyzer("other")


def test_program_text_is_told_from_prose():
    assert suited_tokens(["Returns numpy.ndarray of shape", "the max_iter of a loop"]) == "names"
    assert suited_tokens(["The U.S. won 3.5 medals in 1896.", "An ordinary sentence. Another one."]) == "standard"


def formula(documents, query, k1=0.9, b=0.4):
    """document id → BM25 score where positive, term by term in plain Python."""
    mean, scores = sum(len(terms) for _, terms in documents) / len(documents), {}
    for term in query:
        df = sum(term in terms for _, terms in documents)
        for name, terms in documents:
            tf = terms.count(term)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            scores[name] = scores.get(name, 0) + idf * tf / (tf + k1 * (1 - b + b * len(terms) / mean))
    return {name: score for name, score in scores.items() if score > 0}


def test_scores_by_hand():
    documents = [("b", ["x", "x", "y"]), ("a", ["x", "z"]), ("c", ["z", "z", "z", "z"])]
    queries = [("q", ["x", "y", "unknown"]), ("twice", ["z", "z"]), ("none", ["w"]), ("empty", [])]
    run = Bm25(documents).search(queries, 9)
    assert {q: run.documents(q) for q in run} == {"q": ["b", "a"], "twice": ["c", "a"], "none": [], "empty": []}
    idf = math.log(1 + 1.5 / 2.5)  # two of three documents
    assert dict(run["twice"])["a"] == pytest.approx(2 * idf / (1 + 0.9 * (0.6 + 0.4 * 2 / 3)))
    for query, terms in queries:
        assert dict(run[query]) == pytest.approx(formula(documents, terms), rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"k1": 1.5, "b": 0.75}])
def test_equals_the_formula(settings):
    chance = random.Random(1)
    documents = [(f"d{i}", [f"t{min(int(chance.expovariate(0.1)), 60)}" for _ in range(chance.randrange(90))])
                 for i in range(120)]
    queries = [(str(i), [f"t{chance.randrange(40)}" for _ in range(4)]) for i in range(25)]
    index = Bm25(documents, **settings)
    run = index.search(queries, 1000, threads=3)
    assert dict(run) == dict(index.search(queries, 1000)) and list(run) == [name for name, _ in queries]
    for query, terms in queries:
        assert dict(run[query]) == pytest.approx(formula(documents, terms, **settings), rel=1e-5)
        assert run[query] == sorted(run[query], key=lambda p: (-p[1], p[0]))


def test_best_equals_sort():
    rng = np.random.default_rng(0)
    for n in (1, 5, 300):
        scores = np.maximum(rng.integers(-5, 9, n), 0).astype(np.float32)
        whole = sorted(np.flatnonzero(scores).tolist(), key=lambda row: (-scores[row], row))
        for hits in (1, 2, n - 1 or 1, n, n + 5):
            rows, found = best(scores, hits)
            assert rows.tolist() == whole[:hits] and found.tolist() == scores[whole[:hits]].tolist()


def test_sizes():
    index = Bm25([("a", ["x", "x", "y"]), ("b", ["y"])])
    assert index.mean_terms == 1.5 and index.n_bytes >= 3 * 8


def test_ties_and_cut():
    index = Bm25([(f"d{i}", ["x"]) for i in (3, 1, 2, 10)])
    assert index.search([("q", ["x"])], 3).documents("q") == ["d1", "d10", "d2"]


def test_many_hits_are_cut_exactly():
    chance = random.Random(2)
    documents = [(f"d{i:05d}", ["x"] * chance.randrange(1, 20) + ["y"]) for i in range(9000)]
    index = Bm25(documents)
    whole, cut = (index.search([("q", ["x"])], hits) for hits in (9000, 7))
    assert cut["q"] == whole["q"][:7] == sorted(whole["q"], key=lambda p: (-p[1], p[0]))[:7]


def test_nothing_to_index():
    with pytest.raises(InputError, match="no text"):
        Bm25.of_text([Passage("a", "", "the of")])


def test_title_and_text_are_one_field():
    index = Bm25.of_text([Passage("a", "Cats", "sleep"), Passage("b", "", "dogs sleep")])
    assert index.analyzer.tokens == "standard" and index.mean_terms == 2
    assert index.search([("q", index.analyzer("the cat"))], 5).documents("q") == ["a"]


ANSERINI = {
    "squad-small": ("dev", {"MRR@10": 0.7484, "nDCG@10": 0.7803, "Recall@100": 0.9627, "Recall@1000": 0.9898}),
    "cranfield": ("test", {"MRR@10": 0.5022, "nDCG@10": 0.3564, "Recall@100": 0.7206, "Recall@1000": 0.9518}),
}


@pytest.mark.slow
@pytest.mark.parametrize("collection", ANSERINI)
def test_figures_are_anserinis(collection):
    """Anserini 1.7.1, k1 0.9, b 0.4, title and text in one field; its document lengths are rounded to a byte."""
    split, published = ANSERINI[collection]
    if not (SHARED / collection).is_dir():
        pytest.skip(f"needs the collection {collection}")
    ranked = bm25_run(SHARED / collection, split, 1000)
    means = evaluate(ranked.run, Corpus.open(SHARED / collection).qrels(split)).means
    assert {name: means[name] for name in published} == pytest.approx(published, abs=0.002)
