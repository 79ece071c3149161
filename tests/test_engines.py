"""Engines against a dense dot product, and against each other."""

from __future__ import annotations

import numpy as np
import pytest

from lexmae.errors import InputError
from lexmae.retrieval import anserini, engines, exact, kernels, segments
from lexmae.retrieval.kernels import keep_best
from lexmae.retrieval.stored import StoredVectors
from lexmae.retrieval.vectors import Csr, SparseVectors, quantise, write_vocabulary

V = 60
VOCABULARY = [f"tok{i}" for i in range(V)]


def vectors(n, seed, prefix, density=0.2, scale=100, **extra):
    rng = np.random.default_rng(seed)
    dense = rng.exponential(1.0, (n, V)) * (rng.random((n, V)) < density)
    ids = [f"{prefix}{i}" for i in rng.permutation(n)]
    return SparseVectors(ids, *quantise(dense, 0, scale), VOCABULARY, extra)


def brute_force(docs, queries, hits):
    """Every score, then Python's sort."""
    scores = queries.to_scipy().toarray() @ docs.to_scipy().toarray().T
    return {name: sorted(((d, int(s)) for d, s in zip(docs.ids, row, strict=True) if s > 0),
                         key=lambda p: (-p[1], p[0]))[:hits] for name, row in zip(queries.ids, scores, strict=True)}


@pytest.mark.parametrize("block", [128, 256, 1 << 15])
@pytest.mark.parametrize("hits", [1, 10, 200, 5000])
def test_exact_equals_brute_force(tmp_path, block, hits):
    docs, queries = vectors(700, 0, "d"), vectors(6, 1, "q", density=0.1)
    segments.write(StoredVectors.of(docs), tmp_path / "segment-0000", block=block)
    write_vocabulary(tmp_path, VOCABULARY)
    index = exact.ExactIndex(tmp_path, block)
    assert dict(index.search(queries, hits, threads=2)) == brute_force(docs, queries, hits)


@pytest.mark.parametrize("scale", [1, 100, 3000])
def test_compiled_kernels_equal_brute_force(tmp_path, scale):
    """Scale 1 gives many ties, scale 3000 weights beyond 8 bits; more documents than one block holds."""
    docs = vectors(segments.BLOCK + 3000, 2, "d", density=0.05, scale=scale)
    queries = vectors(12, 3, "q", density=0.1, scale=scale)
    index = engines.build(docs, "exact", tmp_path / "i")
    for hits in (3, 1000):
        assert dict(index.search(queries, hits, threads=2)) == brute_force(docs, queries, hits)


def test_an_index_of_the_older_layout_is_refused(tmp_path):
    engines.build(vectors(20, 6, "d"), "exact", tmp_path / "i")
    (tmp_path / "i" / "segment-0000").rename(tmp_path / "i" / "other")
    with pytest.raises(InputError, match="made by an older version; index the vectors again"):
        engines.open_index(tmp_path / "i")


def test_scores_are_the_dot_products_of_the_integer_weights(tmp_path):
    """Weights over the whole range of 16 bits, more documents than a block, against a dense product in int64."""
    docs, queries = vectors(segments.BLOCK + 500, 11, "d", density=0.1, scale=9000), vectors(3, 12, "q", scale=7)
    dense = queries.to_scipy().toarray().astype(np.int64) @ docs.to_scipy().toarray().astype(np.int64).T
    row = {name: number for number, name in enumerate(docs.ids)}
    run = engines.build(docs, "exact", tmp_path / "i").search(queries, len(docs))
    for number, name in enumerate(queries.ids):
        assert len(run[name]) == (dense[number] > 0).sum()
        assert all(score == dense[number, row[document]] for document, score in run[name])


def test_keep_best_equals_sort():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 10, 500):
        for hits in (1, 2, n - 1, n, n + 5):
            keys = rng.permutation(10 * n)[:n].astype(np.int64)
            expected = np.sort(keys)[::-1][:hits]
            assert keep_best(keys, n, hits) == len(expected)
            np.testing.assert_array_equal(np.sort(keys[:hits])[::-1], expected)


def test_kernels_compile_without_a_cache_folder(monkeypatch):
    real = kernels.numba.njit

    def no_folder(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(kernels.numba, "njit", no_folder)
    assert kernels.compiled(lambda x: x + 1)(2) == 3


def test_only_documents_that_share_a_term_are_found(tmp_path):
    dense = np.zeros((3, V))
    dense[0, 4], dense[1, 5], dense[2, 4] = 1, 1, 2
    docs = SparseVectors(["b", "a", "c"], *quantise(dense, 0), VOCABULARY)
    queries = SparseVectors(["q", "none"], *quantise(dense[[0, 0]] * [[1], [0]], 59), VOCABULARY)
    run = engines.build(docs, "exact", tmp_path / "i").search(queries, 10)
    assert dict(run) == {"q": [("c", 20000), ("b", 10000)], "none": []}
    assert run.seconds > 0


def test_scores_beyond_31_bits(tmp_path):
    ids = [f"d{i}" for i in range(5)]
    docs = SparseVectors(ids, np.arange(6) * 2, np.array([0, 1] * 5, np.int32),
                         np.array([65535, 1, 65535, 2, 9, 9, 65535, 2, 1, 1], np.uint16), VOCABULARY)
    queries = SparseVectors(["big", "small"], *Csr(np.array([0, 2, 4]), np.array([0, 1, 0, 1], np.int32),
                                                   np.array([65535, 65535, 1, 1], np.uint16)), VOCABULARY)
    assert dict(engines.build(docs, "exact", tmp_path / "i").search(queries, 4)) == brute_force(docs, queries, 4)


def test_threads_and_order_of_parts_change_nothing(tmp_path):
    docs, queries = vectors(500, 4, "d", scale=2), vectors(40, 5, "q")
    shuffled = np.random.default_rng(0).permutation(500)
    rows = [docs.row(i) for i in shuffled]
    other = SparseVectors([docs.ids[i] for i in shuffled], np.concatenate([[0], np.cumsum([len(r[0]) for r in rows])]),
                          np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows]), VOCABULARY)
    one = engines.build(docs, "exact", tmp_path / "a").search(queries, 20, threads=1)
    many = engines.build(other, "exact", tmp_path / "b").search(queries, 20, threads=5)
    assert dict(one) == dict(many) and list(one) == list(many) == queries.ids


def test_index_is_an_artifact_that_knows_its_engine(tmp_path):
    docs = vectors(20, 6, "d", side="docs", tokenizer_hash="x")
    docs.save(tmp_path / "v")
    made = engines.build(tmp_path / "v", "exact", tmp_path / "i", top_k=3)
    assert (made.engine, len(made), made.manifest.counts["postings"]) == ("exact", 20, len(docs.pruned(3).indices))
    assert made.manifest.inputs["vectors"]["fingerprint"]
    queries = vectors(5, 7, "q")
    assert dict(engines.open_index(tmp_path / "i").search(queries, 9)) == brute_force(docs.pruned(3), queries, 9)
    with pytest.raises(InputError, match="already exists"):
        engines.build(tmp_path / "v", "exact", tmp_path / "i")
    engines.build(tmp_path / "v", "exact", tmp_path / "i", overwrite=True)


def test_mismatches_are_refused(tmp_path):
    docs, queries = vectors(20, 6, "d", side="docs", tokenizer_hash="x", scale=100), vectors(5, 7, "q")
    index = engines.build(docs, "exact", tmp_path / "i")
    with pytest.raises(InputError, match="at least 1"):
        index.search(queries, 0)
    queries.extra["tokenizer_hash"] = "y"
    with pytest.raises(InputError, match="tokenizer_hash x, the queries with y"):
        index.search(queries, 10)
    queries.vocabulary = [*VOCABULARY[:-1], "other"]
    with pytest.raises(InputError, match="another vocabulary"):
        index.search(queries, 10)
    with pytest.raises(InputError, match="unknown engine 'fast': known are exact"):
        engines.build(docs, "fast", tmp_path / "j")
    queries.extra["side"] = "queries"
    queries.save(tmp_path / "q")
    with pytest.raises(InputError, match="vectors of docs are needed"):
        engines.build(tmp_path / "q", "exact", tmp_path / "j")
    assert not (tmp_path / "j").exists()


@pytest.fixture
def java():
    try:
        anserini.find_java(), anserini.find_jar()
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_anserini_equals_exact(tmp_path, java):
    """Scale 3 gives many ties; a blank text of either side must not disappear."""
    docs, queries = vectors(400, 8, "d", scale=3, side="docs"), vectors(20, 9, "q", density=0.05, scale=3)
    one = engines.build(docs, "anserini", tmp_path / "a")
    other = engines.build(docs, "exact", tmp_path / "e")
    assert engines.open_index(tmp_path / "a").engine == "anserini"
    for hits in (7, 1000):
        found = one.search(queries, hits, threads=2)
        assert dict(found) == dict(other.search(queries, hits)) == brute_force(docs, queries, hits)
        assert list(found) == queries.ids and found.seconds > 0


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_java_must_be_new_enough(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    java = script(tmp_path / "bin" / "java", "echo 'openjdk version \"17.0.1\" 2021' >&2")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr(anserini.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(anserini.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"Java 21 or newer \(.*version 17\); .*lexmae\[anserini\]"):
        anserini.find_java()
    script(java, "echo 'openjdk version \"22\" 2024' >&2")
    assert anserini.find_java() == java


def test_missing_jar(monkeypatch, tmp_path):
    monkeypatch.setattr(anserini.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("ANSERINI_JAR", raising=False)
    with pytest.raises(InputError, match=r'pip install "lexmae\[anserini\]"'):
        anserini.find_jar()
    monkeypatch.setenv("ANSERINI_JAR", str(tmp_path / "none.jar"))
    with pytest.raises(InputError, match="names no file"):
        anserini.find_jar()


def test_failing_java_shows_its_last_lines(tmp_path):
    java = script(tmp_path / "java", "echo first; echo 'Exception: disk is full' >&2; exit 3")
    with pytest.raises(InputError, match="(?s)SearchCollection failed with exit code 3.*disk is full"):
        anserini.run_java(java, tmp_path / "x.jar", "io.anserini.search.SearchCollection", [])


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(anserini, "find_jar", lambda: tmp_path / "x.jar")
    monkeypatch.setattr(anserini, "find_java", lambda: script(tmp_path / "java", "echo indexed: 3; exit 0"))
    with pytest.raises(InputError, match="indexed 3 of 20 documents"):
        engines.build(vectors(20, 6, "d"), "anserini", tmp_path / "i")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["java"]
