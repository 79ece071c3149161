"""Exports hold exactly the weights of the vectors, and refuse what the other engine would misread."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse

from lexmae.errors import InputError
from lexmae.retrieval import export_check
from lexmae.retrieval.export import FORMATS, export
from lexmae.retrieval.vectors import SparseVectors, quantise

VOCABULARY = ["[PAD]", "the", "##s", "é", '"q"', "▁x", "."]


def vectors(side, vocabulary=VOCABULARY, prefix="d"):
    dense = np.array([[0, 1, 0, 0.02, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0.5, 0, 0.03, 0, 0.01, 2, 0.01]])
    return SparseVectors([f"{prefix}{i}" for i in range(3)], *quantise(dense, unk_id=1), vocabulary, {"side": side})


EXPECTED = {"d0": {"the": 100, "é": 2}, "d1": {"the": 1},
            "d2": {"[PAD]": 50, "##s": 3, '"q"': 1, "▁x": 200, ".": 1}}


@pytest.mark.parametrize(("layout", "contents"), [("anserini", "contents"), ("seismic", "content")])
def test_documents_as_json_lines(tmp_path, layout, contents):
    manifest = export(vectors("docs"), layout, tmp_path / "o", file_size=2)
    assert sorted(manifest.files) == ["docs-00000.jsonl", "docs-00001.jsonl"]
    rows = [json.loads(line) for file in sorted(manifest.files)
            for line in (tmp_path / "o" / file).read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["d0", "d1", "d2"]
    assert {row["id"]: row["vector"] for row in rows} == EXPECTED
    assert all(row[contents] == "" and set(map(type, row["vector"].values())) == {int} for row in rows)
    assert manifest.counts["rows"] == 3 and manifest.config["side"] == "docs"


def test_topics_repeat_each_token_as_often_as_it_weighs(tmp_path):
    export(vectors("queries", prefix="q"), "anserini", tmp_path / "o")
    lines = (tmp_path / "o" / "topics.tsv").read_text(encoding="utf-8").splitlines()
    topics = {line.split("\t")[0]: line.split("\t")[1].split(" ") for line in lines}
    assert {f"d{q[1:]}": {t: tokens.count(t) for t in tokens} for q, tokens in topics.items()} == EXPECTED


def test_opensearch_names_features_by_term_id(tmp_path):
    export(vectors("docs"), "opensearch", tmp_path / "o")
    lines = [json.loads(line) for line in (tmp_path / "o" / "bulk-00000.ndjson").read_text().splitlines()]
    assert [line["index"]["_id"] for line in lines[::2]] == ["d0", "d1", "d2"]
    assert lines[1] == {"lexicon": {"1": 100, "3": 2}}
    assert not any("." in name for line in lines[1::2] for name in line["lexicon"])
    export(vectors("queries"), "opensearch", tmp_path / "q")
    assert json.loads((tmp_path / "q" / "queries.jsonl").read_text().splitlines()[0])["query_tokens"] == {"1": 100,
                                                                                                         "3": 2}


@pytest.mark.parametrize(("token", "reason"), [
    ("a b", r"the token 'a b' \(id 1\)"), ("a\u00a0b", "white space"), ("a\x1cb", "white space"), ("", "empty"),
    ("é", r"the token 'é' has the ids 1 and 3"), ("x" * 256, "more than 255 characters")])
@pytest.mark.parametrize("side", ["docs", "queries"])
def test_tokens_that_anserini_would_misread(tmp_path, token, reason, side):
    vocabulary = [VOCABULARY[0], token, *VOCABULARY[2:]]
    with pytest.raises(InputError, match=reason):
        export(vectors(side, vocabulary), "anserini", tmp_path / "o")
    assert not list(tmp_path.iterdir())


def test_a_bad_token_that_no_text_uses_does_no_harm(tmp_path):
    export(vectors("docs", [*VOCABULARY, "a b", "the"]), "anserini", tmp_path / "o")
    export(vectors("docs"), "anserini", tmp_path / "plain")
    texts = [[p.read_text(encoding="utf-8") for p in sorted((tmp_path / name).rglob("*.json*"))
              if p.name != "manifest.json"] for name in ("o", "plain")]
    assert texts[0] == texts[1] and texts[0]


def test_other_bad_vectors(tmp_path):
    blank = vectors("docs")
    blank.ids = ["a", "b c", "d"]
    with pytest.raises(InputError, match="'b c'"):
        export(blank, "anserini", tmp_path / "o")
    real = vectors("docs")
    real.weights = real.weights / 100
    with pytest.raises(InputError, match="0.9 as 0"):
        export(real, "anserini", tmp_path / "o")
    empty = SparseVectors(["a"], np.zeros(2, np.int64), np.zeros(0, np.int32), np.zeros(0, np.uint16), VOCABULARY)
    with pytest.raises(InputError, match="give the side"):
        export(empty, "anserini", tmp_path / "o")
    with pytest.raises(InputError, match="'a' has no term"):
        export(empty, "anserini", tmp_path / "o", side="docs")
    with pytest.raises(InputError, match="unknown format 'csv'"):
        export(empty, "csv", tmp_path / "o")


def test_from_an_artifact(tmp_path):
    vectors("docs").save(tmp_path / "v")
    manifest = export(tmp_path / "v", "anserini", tmp_path / "o")
    assert manifest.inputs["vectors"]["fingerprint"]
    with pytest.raises(InputError, match="already exists"):
        export(tmp_path / "v", "anserini", tmp_path / "o")
    with pytest.raises(InputError, match="vectors of docs"):
        export(tmp_path / "v", "anserini", tmp_path / "p", side="queries")


# ------------------------------------------------------------------------------------------------------ read back


def many(side, n=300, seed=0, scale=100):
    """Random vectors over a vocabulary of words."""
    rng = np.random.default_rng(seed)
    dense = rng.exponential(1.0, (n, 90)) * (rng.random((n, 90)) < 0.2)
    return SparseVectors([f"{side[0]}{i}" for i in range(n)], *quantise(dense, 1, scale),
                         [f"wörd{i}" for i in range(90)], {"side": side})


@pytest.mark.parametrize("side", ["docs", "queries"])
@pytest.mark.parametrize("layout", FORMATS)
def test_every_format_is_read_back(tmp_path, layout, side, monkeypatch):
    monkeypatch.setattr(export_check, "_CHUNK", 70)
    found = export(many(side), layout, tmp_path / "o", file_size=100).extra["check"]
    assert found == {"texts": 300, "queries": 16, "weights_changed": found["weights_changed"],
                     "weight_error": found["weight_error"], "score_error": found["score_error"]}
    assert "check" not in export(many(side), layout, tmp_path / "p", check=0).extra


def damage(folder, layout):
    """One weight less in the last document."""
    if layout == "csr":
        matrix = scipy.sparse.load_npz(folder / "vectors.npz")
        matrix.data[-1] += 1
        scipy.sparse.save_npz(folder / "vectors.npz", matrix)
        return
    file = next(folder.glob("docs-*.jsonl"), None) or next(folder.glob("bulk-*.ndjson"))
    lines = file.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[-1])
    vector = row.get("vector") or row["lexicon"]
    vector[next(iter(vector))] += 1
    file.write_text("\n".join([*lines[:-1], json.dumps(row)]) + "\n", encoding="utf-8")


@pytest.mark.parametrize("layout", FORMATS)
def test_files_that_differ_are_found_out(tmp_path, layout):
    made = many("docs", 40)
    export(made, layout, tmp_path / "o", check=0)
    export_check.check(made, tmp_path / "o", layout, "docs", 40)
    damage(tmp_path / "o", layout)
    with pytest.raises(InputError, match="read back, 'd39' scores [0-9]+ instead of"):
        export_check.check(made, tmp_path / "o", layout, "docs", 40)
    with pytest.raises(InputError, match="read back, 40 of 41 texts|are not those that were written"):
        export(made, layout, tmp_path / "p", check=0)
        export_check.check(many("docs", 41), tmp_path / "p", layout, "docs", 0)


def test_a_bad_export_does_not_stay(tmp_path):
    """Two entries of the same name: Seismic's format would merge them."""
    made = SparseVectors(["a", "b"], np.array([0, 2, 3]), np.array([0, 1, 1], np.int32), np.array([3, 4, 9], np.uint16),
                         ["same", "same"], {"side": "docs"})
    with pytest.raises(InputError, match="read back, 'a' scores"):
        export(made, "seismic", tmp_path / "o")
    assert not list(tmp_path.iterdir())


def test_loss_of_nine_significant_bits():
    """By Python's own arithmetic; whole numbers up to 512 lose nothing, larger ones less than 1/256."""
    weights = np.arange(1, 65536, dtype=np.int64)
    kept = export_check.nine_bits(weights)
    for weight in (1, 2, 300, 511, 512, 513, 514, 1023, 1025, 40_001, 65_535):
        step = max(1, 2 ** (weight.bit_length() - 9))
        assert kept[weight - 1] == weight // step * step
    assert (kept[:512] == weights[:512]).all() and kept[512] == 512
    assert ((weights - kept) / weights).max() < 1 / 256


@pytest.mark.parametrize(("layout", "scale", "changes"), [
    ("opensearch", 20, False), ("opensearch", 5000, True), ("elasticsearch", 5000, True), ("seismic", 100, False),
    ("seismic", 5000, True), ("anserini", 5000, False), ("csr", 5000, False)])
def test_loss_is_reported(tmp_path, layout, scale, changes):
    made = many("docs", scale=scale)
    found = export(made, layout, tmp_path / "o").extra["check"]
    assert (found["weights_changed"] > 0.1) == (found["weight_error"] > 0) == changes
    assert found["score_error"] <= found["weight_error"] <= 1 / 256
    if layout == "opensearch" and changes:
        kept = [w >> max(0, w.bit_length() - 9) << max(0, w.bit_length() - 9) for w in made.weights.tolist()]
        assert found["weights_changed"] == pytest.approx(np.mean(np.array(kept) != made.weights))


def test_mappings(tmp_path):
    for layout, kind in (("opensearch", "rank_features"), ("elasticsearch", "sparse_vector")):
        export(vectors("docs"), layout, tmp_path / layout)
        mapping = json.loads((tmp_path / layout / "mapping.json").read_text())
        assert mapping == {"mappings": {"properties": {"lexicon": {"type": kind}}}}
    export(vectors("queries", prefix="q"), "elasticsearch", tmp_path / "q")
    first = json.loads((tmp_path / "q" / "queries.jsonl").read_text().splitlines()[0])
    assert first == {"id": "q0", "query_vector": {"1": 100, "3": 2}}


def test_csr_is_what_scipy_reads(tmp_path):
    made = many("docs")
    export(made, "csr", tmp_path / "o")
    np.testing.assert_array_equal(scipy.sparse.load_npz(tmp_path / "o" / "vectors.npz").toarray(),
                                  made.to_scipy().toarray())
    assert (tmp_path / "o" / "ids.txt").read_text().split() == made.ids
