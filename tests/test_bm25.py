"""BM25: analysis like Lucene's, weights by hand, and agreement with bm25s."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from lexmae.data.corpus import Corpus, Passage
from lexmae.errors import InputError
from lexmae.retrieval.bm25 import Analyzer, Bm25, lucene_length, name_parts, suited_tokens, words
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


def test_lucene_length_is_exact_to_forty():
    assert lucene_length(np.array([0, 1, 24, 39, 40, 41, 42, 56, 57, 1000])).tolist() == [
        0, 1, 24, 39, 40, 40, 42, 56, 56, 984]


def test_scores_by_hand():
    documents = [("b", ["x", "x", "y"]), ("a", ["x", "z"]), ("c", ["z", "z", "z", "z"])]
    queries = [("q", ["x", "y", "unknown"]), ("twice", ["z", "z"]), ("none", ["w"])]
    run = Bm25(documents, k1=0.9, b=0.4).search(queries, 9)
    mean, idf = 9 / 3, {t: math.log(1 + (3 - df + 0.5) / (df + 0.5)) for t, df in {"x": 2, "y": 1, "z": 2}.items()}

    def weight(term, tf, length):
        return idf[term] * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * length / mean))

    expected = {"q": [("b", weight("x", 2, 3) + weight("y", 1, 3)), ("a", weight("x", 1, 2))],
                "twice": [("c", 2 * weight("z", 4, 4)), ("a", 2 * weight("z", 1, 2))], "none": []}
    assert {q: [d for d, _ in pairs] for q, pairs in run.items()} == {q: [d for d, _ in p] for q, p in expected.items()}
    for query, pairs in expected.items():
        assert [s for _, s in run[query]] == pytest.approx([s for _, s in pairs], rel=1e-6)


def test_agrees_with_bm25s_on_short_documents():
    bm25s = pytest.importorskip("bm25s")
    chance = random.Random(1)
    texts = [[f"t{min(int(chance.expovariate(0.1)), 60)}" for _ in range(chance.randrange(1, 24))] for _ in range(120)]
    ids = [f"d{i}" for i in range(120)]
    queries = [[f"t{chance.randrange(40)}" for _ in range(4)] for _ in range(25)]
    other = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    other.index(texts, show_progress=False)
    run = Bm25(zip(ids, texts, strict=True)).search([(str(i), q) for i, q in enumerate(queries)], 1000, threads=3)
    for i, query in enumerate(queries):
        scores = dict(zip(ids, other.get_scores(query).tolist(), strict=True))
        assert dict(run[str(i)]) == pytest.approx({d: s for d, s in scores.items() if s > 0}, rel=1e-5)


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


@pytest.mark.slow
def test_figures_equal_anserinis():
    """Anserini 1.7.1, k1 0.9, b 0.4, title and text in one field."""
    if not (SHARED / "squad-small").is_dir():
        pytest.skip("needs the collection squad-small")
    ranked = bm25_run(SHARED / "squad-small", "dev", 1000)
    means = evaluate(ranked.run, Corpus.open(SHARED / "squad-small").qrels("dev")).means
    published = {"MRR@10": 0.7484, "nDCG@10": 0.7803, "Recall@100": 0.9627, "Recall@1000": 0.9898}
    assert {name: round(means[name], 4) for name in published} == published
