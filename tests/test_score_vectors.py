"""Scores that are dot products of vectors: against the products one by one, for lists, runs and split documents."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lexmae.data.negatives import Row, read_negatives, write_negatives
from lexmae.errors import InputError
from lexmae.retrieval import score_vectors
from lexmae.retrieval.dense import DenseVectors
from lexmae.retrieval.runs import Run, read_run, write_run
from lexmae.retrieval.score import ScoreConfig
from lexmae.retrieval.vectors import SparseVectors, quantise

ROOT = Path(__file__).parents[1]
TRAIN = ScoreConfig("train")
VOCABULARY = [f"tok{i}" for i in range(30)]


def dense(ids, seed, side, width=6, **extra):
    return DenseVectors(list(ids), np.random.default_rng(seed).normal(size=(len(ids), width)).astype(np.float32),
                        {"side": side, **extra})


def sparse(ids, seed, side, vocabulary=VOCABULARY):
    random = np.random.default_rng(seed)
    values = random.exponential(1.0, (len(ids), len(vocabulary))) * (random.random((len(ids), len(vocabulary))) < 0.3)
    return SparseVectors(list(ids), *quantise(values, 0), vocabulary, {"side": side})


def truth(docs, queries) -> dict[tuple[str, str], float]:
    """Every dot product, of true weights."""
    parts = [v.matrix.astype(np.float64) if isinstance(v, DenseVectors) else v.to_scipy().toarray() / 100.0
             for v in (docs, queries)]
    return {(q, d): score for q, row in zip(queries.ids, parts[1] @ parts[0].T, strict=True)
            for d, score in zip(docs.ids, row, strict=True)}


@pytest.fixture(params=[dense, sparse])
def saved(request, tiny_shards, tmp_path):
    """Folders of vectors, in an order that is not the shards', and the true products."""
    docs = request.param(tiny_shards.docs.ids()[::-1], 1, "docs")
    queries = request.param(tiny_shards.queries("train").ids()[::-1], 2, "queries")
    docs.save(tmp_path / "docs")
    queries.save(tmp_path / "queries")
    return tmp_path / "docs", tmp_path / "queries", truth(docs, queries)


def test_negatives_and_positives(saved, shards_dir, tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(score_vectors, "_BLOCK", 2)
    docs, queries, true = saved
    given = [Row("t1", ["d3", "d1", "d8"]), Row("t0", ["d5"]), Row("elsewhere", ["d5"]), Row("t2", ["d9", "d4"])]
    write_negatives(tmp_path / "n.jsonl", given)
    figures = score_vectors.score(docs, queries, shards_dir, tmp_path / "s.jsonl", TRAIN, 20.0,
                                  negatives=tmp_path / "n.jsonl")
    found = list(read_negatives(tmp_path / "s.jsonl"))
    assert [row.qid for row in found] == ["t1", "t0", "t2"]
    for row in found:
        assert row.negatives == next(r.negatives for r in given if r.qid == row.qid)
        assert row.scores == pytest.approx([20 * true[row.qid, d] for d in row.negatives], abs=1e-5)
        judged = {d for d, relevance in tiny_shards.qrels("train")[row.qid].items() if relevance > 0}
        assert row.positives == pytest.approx({d: 20 * true[row.qid, d] for d in judged}, abs=1e-5)
    assert figures["queries"] == 3 and (tmp_path / "s.jsonl.sha256").is_file()
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_is_ranked_anew_down_to_the_depth(saved, shards_dir, tmp_path):
    docs, queries, true = saved
    names = [f"d{i}" for i in range(8)]
    write_run(tmp_path / "run", Run.from_pairs({"t4": [(name, 10.0 - i) for i, name in enumerate(names)]}))
    score_vectors.score(docs, queries, shards_dir, tmp_path / "s", ScoreConfig("train", depth=5), run=tmp_path / "run")
    found = read_run(tmp_path / "s").documents("t4")
    assert found == sorted(names[:5], key=lambda name: -true["t4", name]) + names[5:]
    assert not (tmp_path / "s.sha256").exists()


def test_a_split_document_scores_as_its_best_passage(long_shards, tmp_path):
    docs = dense(long_shards.docs.ids(), 3, "docs")
    queries = dense(long_shards.queries("train").ids(), 4, "queries")
    docs.save(tmp_path / "docs")
    queries.save(tmp_path / "queries")
    true = truth(docs, queries)
    passages = [name for name in docs.ids if name.startswith("D4#")]
    write_negatives(tmp_path / "n", [Row("t0", ["D4", passages[1]])])
    score_vectors.score(tmp_path / "docs", tmp_path / "queries", long_shards.path, tmp_path / "s", TRAIN,
                        negatives=tmp_path / "n")
    row, = read_negatives(tmp_path / "s")
    assert len(passages) > 3
    assert row.scores == pytest.approx([max(true["t0", p] for p in passages), true["t0", passages[1]]], abs=1e-5)


def test_refusals(shards_dir, tiny_shards, tmp_path):
    ids, asked = tiny_shards.docs.ids(), tiny_shards.queries("train").ids()
    for name, vectors in (("docs", dense(ids, 1, "docs")), ("few", dense([d for d in ids if d != "d30"], 1, "docs")),
                          ("sparse", sparse(ids, 1, "docs")), ("queries", dense(asked, 2, "queries")),
                          ("no-t0", dense([q for q in asked if q != "t0"], 2, "queries")),
                          ("wide", dense(asked, 2, "queries", width=7)),
                          ("cls", dense(asked, 2, "queries", representation="cls")),
                          ("mean", dense(ids, 2, "docs", representation="mean")),
                          ("words", sparse(asked, 2, "queries", [*VOCABULARY[1:], "other"]))):
        vectors.save(tmp_path / name)
    write_negatives(tmp_path / "n", [Row("t0", ["d5", "d30"])])
    for docs, queries, reason in (("few", "queries", "few: has no vector of 'd30'"),
                                  ("docs", "no-t0", "no-t0: has no vector of 't0'"),
                                  ("sparse", "queries", "one is of dense vectors, the other of sparse ones"),
                                  ("docs", "wide", "wide: has 7 dimensions, the documents have 6"),
                                  ("queries", "docs", "vectors of queries, but vectors of docs are needed"),
                                  ("mean", "cls", "representation mean, the queries with cls"),
                                  ("sparse", "words", "vocabulary is another")):
        with pytest.raises(InputError, match=reason):
            score_vectors.score(tmp_path / docs, tmp_path / queries, shards_dir, tmp_path / "s", TRAIN,
                                negatives=tmp_path / "n")
    assert not (tmp_path / "s").exists() and not list(tmp_path.glob("*.partial"))
    (tmp_path / "s").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        score_vectors.score(tmp_path / "docs", tmp_path / "queries", shards_dir, tmp_path / "s", TRAIN,
                            negatives=tmp_path / "n")


def test_the_command(shards_dir, tiny_shards, tmp_path):
    def command(*options) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, ROOT / "tools/score.py", "--data", shards_dir, "--split", "train",
                               "--negatives", tmp_path / "n", "--output", tmp_path / "s", *map(str, options)],
                              capture_output=True, text=True)

    dense(tiny_shards.docs.ids(), 1, "docs").save(tmp_path / "docs")
    dense(tiny_shards.queries("train").ids(), 2, "queries").save(tmp_path / "queries")
    write_negatives(tmp_path / "n", [Row("t0", ["d5", "d7"])])
    vectors = ("--vectors", tmp_path / "docs", tmp_path / "queries")
    for options, reason in (((*vectors, "--max-length", 9), "--max-length goes with --model"),
                            (("--model", tmp_path, "--scale", 2), "--scale goes with --vectors"),
                            ((*vectors, "--scale", 0), "--scale must be above 0"),
                            ((), "one of the arguments --model --vectors is required")):
        failed = command(*options)
        assert failed.returncode == 2 and reason in failed.stderr
    assert command(*vectors, "--scale", 3, "--json", tmp_path / "speed.json").returncode == 0
    assert len(list(read_negatives(tmp_path / "s"))) == 1 and (tmp_path / "speed.json").is_file()
