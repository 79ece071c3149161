"""Lists of negatives as rows, and drawing from them."""

from __future__ import annotations

import numpy as np
import pytest

from lexmae import artifact
from lexmae.data import draws
from lexmae.data.negatives import write_negatives
from lexmae.data.randomness import KeyedRandom
from lexmae.errors import InputError


@pytest.fixture
def build(tiny_shards, tmp_path):
    """Lists by query → NegativeLists of the split train; None has no file at all."""
    def make(rows: dict[str, list[str]] | None, depth: int = 100, split: str = "train") -> draws.NegativeLists:
        source = None
        if rows is not None:
            source = tmp_path / "n.jsonl"
            write_negatives(source, ((qid, names, None) for qid, names in rows.items()))
        draws.build(tiny_shards, split, source, depth, tmp_path / "lists")
        return draws.NegativeLists(tmp_path / "lists")
    return make


def row(shards, qid: str) -> int:
    return int(shards.queries("train").rows([qid])[0])


def draw(lists, queries, count: int, examples=None, seed: int = 1) -> np.ndarray:
    examples = np.arange(len(queries)) if examples is None else np.asarray(examples)
    return lists.draw(np.asarray(queries), count, KeyedRandom(seed, examples), 8)


def names(shards, rows) -> list[str]:
    return shards.docs.ids(np.asarray(rows).ravel())


def test_pairs_are_the_positive_judgements(tiny_shards, build):
    lists = build({"t0": ["d5"]})
    judged = {(qid, doc) for qid, found in tiny_shards.qrels("train").items() for doc, grade in found.items() if grade}
    queries = tiny_shards.queries("train").ids()
    found = [(queries[q], tiny_shards.docs.id(d)) for q, d in lists.judged_pairs().tolist()]
    assert len(found) == 16 and set(found) == judged
    assert sorted(names(tiny_shards, lists.judged(row(tiny_shards, "t5")))) == ["d15", "d16", "d17"]
    assert len(lists.judged(row(tiny_shards, "t9"))) == 0
    assert (np.diff(lists.judged(row(tiny_shards, "t5"))) > 0).all()


def test_judged_positives_are_no_negatives_and_do_not_count_for_the_depth(tiny_shards, build):
    # t2's positives are d6, d1, d2; d30 is judged 0, which is no positive
    lists = build({"t2": ["d1", "d30", "d6", "d9", "d2", "d10", "d11"]}, depth=3)
    assert set(names(tiny_shards, draw(lists, [row(tiny_shards, "t2")], 3))) == {"d30", "d9", "d10"}


@pytest.mark.parametrize("depth, expected", [(1, 1), (4, 4), (8, 8), (100, 10)])
def test_only_the_top_of_the_list_is_drawn_from(tiny_shards, build, depth, expected):
    ranked = [f"d{i}" for i in range(20, 30)]
    lists = build({"t0": ranked}, depth)
    drawn = draw(lists, [row(tiny_shards, "t0")] * 200, 2)
    assert set(names(tiny_shards, drawn)) == set(ranked[:expected])


def test_enough_are_drawn_without_repeats_and_evenly(tiny_shards, build):
    lists = build({"t0": [f"d{i}" for i in range(20, 30)]})
    drawn = draw(lists, [row(tiny_shards, "t0")] * 2000, 4)
    assert all(len(set(found)) == 4 for found in drawn.tolist())
    counts = np.unique(drawn, return_counts=True)[1]
    assert len(counts) == 10 and (abs(counts - 800) < 4.5 * np.sqrt(2000 * 0.4 * 0.6)).all()


def test_too_few_are_repeated_evenly(tiny_shards, build):
    lists = build({"t0": ["d20", "d21", "d22"]})
    for found in draw(lists, [row(tiny_shards, "t0")] * 20, 8).tolist():
        counts = np.unique(found, return_counts=True)[1]
        assert sorted(counts.tolist()) == [2, 3, 3]
    assert draw(lists, [row(tiny_shards, "t0")], 0).shape == (1, 0)


@pytest.mark.parametrize("rows", [None, {"t0": ["d20"], "t5": ["d15", "d16"]}])
def test_without_negatives_passages_are_random_and_never_a_positive(tiny_shards, build, rows):
    lists = build(rows)
    drawn = draw(lists, [row(tiny_shards, "t5")] * 1000, 5)
    counts = np.bincount(drawn.ravel(), minlength=41)
    judged = lists.judged(row(tiny_shards, "t5"))
    assert counts[judged].sum() == 0 and len(judged) == 3
    others = np.delete(counts, judged)
    assert (abs(others - 5000 / 38) < 5 * np.sqrt(5000 / 38)).all()


def test_a_draw_depends_on_its_example_alone(tiny_shards, build):
    lists = build({"t0": [f"d{i}" for i in range(20, 30)], "t1": [f"d{i}" for i in range(9)]})
    rows = [row(tiny_shards, name) for name in ("t0", "t1", "t3")]
    together = draw(lists, rows, 4, [7, 8, 9])
    for i in range(3):
        assert np.array_equal(draw(lists, rows[i:i + 1], 4, [7 + i])[0], together[i])
    assert not np.array_equal(draw(lists, rows, 4, [7, 8, 9], seed=2), together)


def test_an_unknown_document_is_named(tiny_shards, build):
    with pytest.raises(InputError, match="unknown document 'd99'"):
        build({"t0": ["d1", "d99"]})


def test_queries_that_are_not_trained_on_may_be_named(tiny_shards, build):
    lists = build({"v1": ["d99"], "t9": ["d98"], "t0": ["d20"], "elsewhere": ["d97"]})
    assert names(tiny_shards, draw(lists, [row(tiny_shards, "t0")], 1)) == ["d20"]


def test_a_file_about_other_queries_is_refused(build):
    with pytest.raises(InputError, match="names none of the 12 judged queries"):
        build({"v1": ["d1"]})


def test_a_split_without_judgements_is_refused(tiny_shards, build, monkeypatch):
    monkeypatch.setattr(type(tiny_shards), "qrels", lambda self, split: {})
    with pytest.raises(InputError, match="no judged query to train on"):
        build(None)


def test_what_is_written_says_where_it_comes_from(tiny_shards, build, tmp_path, capsys):
    build({"t0": ["d20"]}, depth=7)
    manifest = artifact.read(tmp_path / "lists", "negatives")
    assert manifest.inputs["shards"]["fingerprint"] == tiny_shards.manifest.fingerprint
    assert manifest.inputs["negatives"]["path"].endswith("n.jsonl")
    assert manifest.config == {"split": "train", "depth": 7}
    assert manifest.counts == {"queries": 12, "without_negatives": 11, "documents": 41}
    assert "11 of 12 queries have no hard negatives" in capsys.readouterr().err
    build({"t0": ["d21"]})  # a new run replaces them
    assert artifact.read(tmp_path / "lists").fingerprint != manifest.fingerprint
