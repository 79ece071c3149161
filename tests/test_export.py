"""Exports hold exactly the weights of the vectors, and refuse what the other engine would misread."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lexmae.errors import InputError
from lexmae.retrieval.export import export
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
