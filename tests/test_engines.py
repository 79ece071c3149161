"""Engines against a dense dot product, and against each other."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from launching import reseal

from lexmae.errors import InputError
from lexmae.retrieval import anserini, engines, exact, faiss_engine, kernels, segments
from lexmae.retrieval.dense import DenseVectors
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


@pytest.mark.parametrize("layout", ["best first", "best last", "best first, deleted"])
def test_a_floor_guessed_too_high_is_found_out(tmp_path, monkeypatch, layout):
    """The floor comes from the first block; what it has too many of, the others lack."""
    dense = np.random.default_rng(7).integers(1, 50, (1024, 2)).astype(float)
    best = np.arange(0, 64, kernels.PART) + (0 if layout.startswith("best first") else 896)  # each in its own part
    dense[best] += 1000
    ids = [f"d{i:04d}" for i in range(1024)]
    docs = SparseVectors(ids, *quantise(dense, 0, 1), VOCABULARY[:2])
    queries = SparseVectors(["a", "b"], *quantise(np.array([[1.0, 1.0], [0.0, 3.0]]), 0, 1), VOCABULARY[:2])
    folder = tmp_path / "segment-0000"
    segments.write(StoredVectors.of(docs), folder, block=128)
    write_vocabulary(tmp_path, docs.vocabulary)
    gone = best[:5].astype(np.int32) if layout.endswith("deleted") else np.zeros(0, np.int32)
    np.save(folder / segments.DELETED, gone)
    left = docs.subset(np.setdiff1d(np.arange(1024), gone).tolist())
    index, passes = exact.ExactIndex(tmp_path, 128), []
    monkeypatch.setattr(index, "_add_up", lambda *arguments: (passes.append(1), type(index)._add_up(index, *arguments)))
    index._compiled = True
    assert dict(index.search(queries, 10, threads=1)) == brute_force(left, queries, 10)
    assert len(passes) == (1 if layout == "best last" else 2)


@pytest.mark.parametrize(("n", "threads"), [(1, 1), (3, 8), (256, 1), (257, 1), (1000, 2), (5000, 3), (0, 2)])
def test_chunks_cover_the_queries(n, threads):
    parts = kernels.chunks(n, threads)
    assert [row for part in parts for row in range(*part)] == list(range(n))
    lengths = {last - first for first, last in parts}
    assert not lengths or (max(lengths) <= 256 and max(lengths) - min(lengths) <= 1)


def test_an_index_of_the_older_layout_is_refused(tmp_path):
    engines.build(vectors(20, 6, "d"), "exact", tmp_path / "i")
    (tmp_path / "i" / "segment-0000").rename(tmp_path / "i" / "other")
    reseal(tmp_path / "i")
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


def test_an_index_without_documents_finds_nothing(tmp_path):
    vectors(0, 1, "d").save(tmp_path / "docs")
    run = engines.build(tmp_path / "docs", "exact", tmp_path / "i").search(vectors(3, 2, "q"), 5)
    assert all(found == [] for found in dict(run).values()) and len(run) == 3 and run.seconds is not None


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
    assert "queries processed" in one.log and "indexed:" in (tmp_path / "a" / "anserini.log").read_text()
    assert not other.log and not one.approximate
    (tmp_path / "a" / "lucene").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="does not appear to be a valid index"):
        one.search(queries, 7, threads=1)


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


def test_failing_java_shows_what_it_said(tmp_path, monkeypatch):
    java = script(tmp_path / "java", "echo first; echo 'Exception: disk is full' >&2; exit 3")
    monkeypatch.setattr(anserini.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError, match="SearchCollection failed with exit code 3: Exception: disk is full;") as error:
        anserini.run_java(java, tmp_path / "x.jar", "io.anserini.search.SearchCollection", [])
    assert "\n" not in str(error.value)
    assert Path(str(error.value).rpartition("log: ")[2]).read_text() == "first\nException: disk is full\n"


@pytest.mark.parametrize("said", [
    'Error: "x" does not appear to be a valid index.', "java.lang.OutOfMemoryError: Java heap space",
    "2026-01-01 00:00:00,001 ERROR [pool-1-thread-1] index.X (X.java:1) - Unexpected Exception: bad",
    'Exception in thread "main" java.lang.RuntimeException: no'])
def test_java_that_fails_with_exit_code_0_is_found_out(tmp_path, monkeypatch, said):
    monkeypatch.setattr(anserini.tempfile, "tempdir", str(tmp_path))
    java = script(tmp_path / "java", f"echo 'INFO fine'; echo '{said}'; exit 0")
    with pytest.raises(InputError, match="failed with exit code 0: ") as error:
        anserini.run_java(java, tmp_path / "x.jar", "io.anserini.index.IndexCollection", [])
    assert said in str(error.value)


def test_queries_that_anserini_did_not_search_are_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(anserini.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError, match="searched 3 of 5 queries; its whole log: "):
        (tmp_path / "run").touch()
        anserini._refuse_incomplete("impact(): 3 queries processed in 00:00:00 = ~9.1 q/s", tmp_path / "run", 5)
    with pytest.raises(InputError, match="searched 5 of 5 queries"):
        anserini._refuse_incomplete("impact(): 5 queries processed in 00:00:00", tmp_path / "none", 5)


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(anserini, "find_jar", lambda: tmp_path / "x.jar")
    monkeypatch.setattr(anserini, "find_java", lambda: script(tmp_path / "java", "echo indexed: 3; exit 0"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(anserini.tempfile, "tempdir", str(tmp_path / "tmp"))
    with pytest.raises(InputError, match="indexed 3 of 20 documents"):
        engines.build(vectors(20, 6, "d"), "anserini", tmp_path / "i")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["java", "tmp"]


# --------------------------------------------------------------------------------------------- approximate and dense


def close_to(found, exact, at_least):
    """Share of the exact results that were found, and whether the scores of all that were found are the exact ones."""
    share = np.mean([len({d for d, _ in found[q]} & {d for d, _ in exact[q]}) / len(exact[q]) for q in exact])
    assert share >= at_least, share


@pytest.mark.parametrize("scale", [100, 60_000])
def test_seismic_finds_what_exact_finds(tmp_path, capfd, scale):
    """Scale 60000 gives weights beyond 16-bit floats. With hundreds of queries, Seismic gives results in any order."""
    pytest.importorskip("seismic", reason="needs pyseismic-lsr")
    docs, queries = vectors(600, 10, "d", scale=scale, side="docs"), vectors(400, 11, "q", density=0.1, scale=scale)
    index = engines.build(docs, "seismic", tmp_path / "s")
    assert engines.open_index(tmp_path / "s").engine == "seismic" and index.approximate
    index.set_effort(4)
    found, whole = index.search(queries, 20, threads=2), brute_force(docs, queries, 600)
    assert list(found) == queries.ids and found.seconds > 0
    close_to(found, {q: whole[q][:20] for q in whole}, 0.95)
    for query in found:
        exact = dict(whole[query])
        if scale == 100:
            assert all(score == exact[name] for name, score in found[query])
        else:  # 16-bit floats have 11 significant bits
            assert all(score == pytest.approx(exact[name], rel=1e-3) for name, score in found[query])
    assert capfd.readouterr().out == ""  # Seismic prints


def test_seismic_with_a_large_vocabulary(tmp_path):
    pytest.importorskip("seismic", reason="needs pyseismic-lsr")
    vocabulary = [f"t{i}" for i in range(70_000)]
    docs = SparseVectors(["b", "a"], np.array([0, 2, 3]), np.array([5, 69_999, 69_998], np.int32),
                         np.array([3, 4, 5], np.uint16), vocabulary)
    queries = SparseVectors(["q", "r"], np.array([0, 2, 3]), np.array([5, 69_999, 69_998], np.int32),
                            np.array([1, 10, 2], np.uint16), vocabulary)
    run = engines.build(docs, "seismic", tmp_path / "s").search(queries, 5)
    assert dict(run) == {"q": [("b", 43)], "r": [("a", 10)]}


def dense_vectors(n, seed, prefix, h=8, **extra):
    rng = np.random.default_rng(seed)
    return DenseVectors([f"{prefix}{i}" for i in rng.permutation(n)], rng.normal(size=(n, h)).astype(np.float32), extra)


def dense_brute_force(docs, queries, hits):
    scores = queries.matrix.astype(np.float64) @ docs.matrix.T.astype(np.float64)
    return {q: sorted(zip(docs.ids, row, strict=True), key=lambda p: (-p[1], p[0]))[:hits]
            for q, row in zip(queries.ids, scores, strict=True)}


@pytest.mark.parametrize(("kind", "at_least"), [("flat", 1), ("hnsw", 0.95), ("ivf", 0.95)])
def test_faiss_equals_brute_force(tmp_path, kind, at_least):
    pytest.importorskip("faiss", reason="needs faiss-cpu or faiss-gpu")
    docs, queries = dense_vectors(700, 12, "d"), dense_vectors(30, 13, "q")
    index = engines.build(docs, "faiss", tmp_path / "f", kind=kind)
    index.set_effort(6)
    found, exact = index.search(queries, 15, threads=1), dense_brute_force(docs, queries, 15)
    assert list(found) == queries.ids and index.manifest.extra["kind"] == kind
    close_to(found, exact, at_least)
    if kind == "flat":
        for query in exact:
            assert found.documents(query) == [name for name, _ in exact[query]]
            np.testing.assert_allclose(found.scores(query), [score for _, score in exact[query]], rtol=1e-5)
        assert len(index.search(queries, 5000)["q0"]) == 700


def test_faiss_goes_to_gpus_where_it_finds_some(tmp_path, monkeypatch):
    """With a faiss that claims to have a GPU; a real one is not needed to see who is asked."""
    faiss = pytest.importorskip("faiss", reason="needs faiss-cpu or faiss-gpu")
    moved = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: moved.append(index) or index, raising=False)
    docs, queries = dense_vectors(50, 12, "d"), dense_vectors(3, 13, "q")
    for kind, expected in (("flat", 1), ("hnsw", 1), ("ivf", 2)):
        engines.build(docs, "faiss", tmp_path / kind, kind=kind).search(queries, 5)
        assert len(moved) == expected, kind
    monkeypatch.setattr(faiss_engine, "_GPU_LARGEST", 10)
    index = engines.build(dense_vectors(700, 12, "d"), "faiss", tmp_path / "large", kind="ivf")  # 17 clusters
    for effort, hits, expected in ((1, 10, 3), (6, 10, 3), (1, 11, 3)):  # faiss refuses more hits or clusters than that
        index.set_effort(effort)
        index.search(queries, hits)
        assert len(moved) == expected, (effort, hits)


def test_dense_and_sparse_are_told_apart(tmp_path):
    pytest.importorskip("faiss", reason="needs faiss-cpu or faiss-gpu")
    facts = {"tokenizer_hash": "x", "representation": "cls"}
    docs = dense_vectors(20, 1, "d", side="docs", **facts)
    docs.save(tmp_path / "dense")
    vectors(20, 6, "d", side="docs").save(tmp_path / "sparse")
    with pytest.raises(InputError, match="holds sparse vectors, which the engine faiss does not search: encode with"):
        engines.build(tmp_path / "sparse", "faiss", tmp_path / "i")
    with pytest.raises(InputError, match="holds dense vectors, which the engine exact does not search"):
        engines.build(tmp_path / "dense", "exact", tmp_path / "i")
    with pytest.raises(InputError, match="no terms to leave out"):
        engines.build(docs, "faiss", tmp_path / "i", top_k=3)
    with pytest.raises(InputError, match="unknown kind of faiss index 'pq'"):
        engines.build(docs, "faiss", tmp_path / "i", kind="pq")
    index = engines.build(tmp_path / "dense", "faiss", tmp_path / "i")
    with pytest.raises(InputError, match="have 8 dimensions, the queries 4"):
        index.search(dense_vectors(2, 2, "q", h=4))
    with pytest.raises(InputError, match="representation cls, the queries with bottleneck"):
        index.search(dense_vectors(2, 2, "q", tokenizer_hash="x", representation="bottleneck"))
    for effort in (0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="effort must be a number above 0"):
            index.set_effort(effort)
    with pytest.raises(InputError, match="exact is exact"):
        engines.build(tmp_path / "sparse", "exact", tmp_path / "e").set_effort(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "e", "i", "sparse"]


@pytest.mark.parametrize(("engine", "extra"), [("seismic", "seismic"), ("faiss", "dense")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, engine, extra):
    monkeypatch.setitem(sys.modules, engine, None)
    docs = dense_vectors(5, 1, "d") if engine == "faiss" else vectors(5, 1, "d")
    with pytest.raises(InputError, match=rf'pip install "lexmae\[{extra}\]"'):
        engines.build(docs, engine, tmp_path / "i")


@pytest.mark.parametrize(("engine", "package", "file"), [("seismic", "seismic", "seismic.index.seismic"),
                                                         ("faiss", "faiss", "faiss.index")])
def test_a_damaged_index_is_refused(tmp_path, engine, package, file):
    pytest.importorskip(package)
    engines.build(dense_vectors(50, 1, "d") if engine == "faiss" else vectors(50, 1, "d"), engine, tmp_path / "i")
    (tmp_path / "i" / file).write_bytes((tmp_path / "i" / file).read_bytes()[:40])
    reseal(tmp_path / "i")
    with pytest.raises(InputError, match="cannot read it"):
        engines.open_index(tmp_path / "i")


def test_what_an_engine_lacks_is_said_before_it_is_used(monkeypatch):
    engines.check("exact")
    monkeypatch.setenv("ANSERINI_JAR", "/nowhere.jar")
    monkeypatch.setattr(anserini, "find_java", lambda: Path("java"))
    with pytest.raises(InputError, match="ANSERINI_JAR names no file"):
        engines.check("anserini")
    monkeypatch.setitem(sys.modules, "seismic", None)
    with pytest.raises(InputError, match="the engine seismic is not installed"):
        engines.check("seismic")
