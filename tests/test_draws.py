"""Lists of negatives as rows, and drawing from them."""

from __future__ import annotations

import numpy as np
import pytest

from lexmae import artifact
from lexmae.config import NegativesConfig, NegativeSource
from lexmae.data import draws, negative_rows
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
        negative_rows.build(tiny_shards, split, NegativesConfig(str(source or ""), depth=depth), tmp_path / "lists")
        return draws.NegativeLists(tmp_path / "lists")
    return make


def row(shards, qid: str) -> int:
    return int(shards.queries("train").rows([qid])[0])


def draw(lists, queries, count: int, examples=None, seed: int = 1) -> np.ndarray:
    examples = np.arange(len(queries)) if examples is None else np.asarray(examples)
    return lists.draw(np.asarray(queries), count, KeyedRandom(seed, examples), 8)[0]


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
    with pytest.raises(InputError, match="n.jsonl: query 't0': unknown document 'd99' of "):
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
    source = {"path": str(tmp_path / "n.jsonl"), "share": 1.0, "skip": 0, "depth": 7}
    assert manifest.config == {"split": "train", "sources": [source], "filter_margin": None, "filter_ratio": None,
                               "distil": False, "checksums": [artifact.checksum(tmp_path / "n.jsonl")]}
    left_out = {"positives": 0, "above_margin": 0, "above_ratio": 0, "queries_without_scores": 0}
    assert manifest.counts == {"queries": 12, "without_negatives": 11, "documents": 41,
                               "sources": [{"queries": 1, "kept": 1, **left_out}]}
    assert "11 of 12 queries have no hard negatives" in capsys.readouterr().err
    written = (tmp_path / "lists" / artifact.MANIFEST).stat().st_mtime_ns
    build({"t0": ["d20"]}, depth=7)  # the same again
    assert (tmp_path / "lists" / artifact.MANIFEST).stat().st_mtime_ns == written
    (tmp_path / "lists" / "source0-rows.npy").write_bytes(b"damaged")
    build({"t0": ["d20"]}, depth=7)
    assert artifact.read(tmp_path / "lists").fingerprint == manifest.fingerprint
    build({"t0": ["d21"]}, depth=7)  # a file of other content replaces them
    assert artifact.read(tmp_path / "lists").fingerprint != manifest.fingerprint


# ------------------------------------------------------------------------------------- several sources and filters


def several(shards, folder, sources: list[dict[str, list[str]]], **options) -> draws.NegativeLists:
    """Lists of several files; ``options`` are lists of shares, skips and depths, or further settings."""
    given = []
    for i, rows in enumerate(sources):
        write_negatives(folder / f"{i}.jsonl", rows.items())
        own = {name: values[i] for name, values in options.items() if isinstance(values, list)}
        given.append(NegativeSource(str(folder / f"{i}.jsonl"), **own))
    negative_rows.build(shards, "train", NegativesConfig(sources=tuple(given)), folder / "lists")
    return draws.NegativeLists(folder / "lists")


def test_one_source_is_drawn_from_as_its_noise_orders_it(tiny_shards, build):
    pool = [f"d{i}" for i in range(20, 30)]
    lists, examples = build({"t0": pool}), np.arange(50)
    noise = KeyedRandom(1, examples).uniform(8, 10)
    expected = tiny_shards.docs.rows(pool)[np.argsort(noise, axis=1, kind="stable")[:, :4]]
    assert np.array_equal(draw(lists, [row(tiny_shards, "t0")] * 50, 4, examples), expected)


@pytest.mark.parametrize("shares", [[1.0, 1.0], [3.0, 1.0], [0.5, 0.2, 0.3], [1.0, 9.0]])
def test_sources_give_their_shares(tiny_shards, tmp_path, shares):
    pools = [[f"d{i}" for i in range(1 + 9 * part, 10 + 9 * part)] for part in range(len(shares))]
    lists = several(tiny_shards, tmp_path, [{"t0": pool} for pool in pools], share=shares)
    drawn = draw(lists, [row(tiny_shards, "t0")] * 3000, 5)
    assert all(len(set(found)) == 5 for found in drawn.tolist())
    for pool, share in zip(pools, np.array(shares) / sum(shares), strict=True):
        each = np.isin(drawn, tiny_shards.docs.rows(pool)).sum(1)
        assert abs(each.mean() - 5 * share) < 0.04
        assert set(each.tolist()) <= {int(np.floor(5 * share)), int(np.ceil(5 * share))}, "never far from the share"


def test_ranks_of_a_source(tiny_shards, tmp_path):
    ranked = ["d0"] + [f"d{i}" for i in range(20, 30)]  # d0 is t0's positive and takes no rank
    lists = several(tiny_shards, tmp_path, [{"t0": ranked}, {"t0": ranked}], skip=[2, 7], depth=[5, 9])
    drawn = draw(lists, [row(tiny_shards, "t0")] * 300, 2)
    assert set(names(tiny_shards, drawn)) == {"d22", "d23", "d24", "d27", "d28"}
    for found in drawn.tolist():
        kinds = {name in ("d22", "d23", "d24") for name in names(tiny_shards, found)}
        assert kinds == {True, False}, "one of each source"


def test_no_document_twice_and_other_sources_step_in(tiny_shards, tmp_path):
    sources = [{"t0": ["d20", "d21"]}, {"t0": ["d21", "d22", "d23", "d24", "d25"]}, {"t1": ["d1"]}]
    lists = several(tiny_shards, tmp_path, sources)
    for found in draw(lists, [row(tiny_shards, "t0")] * 200, 6).tolist():
        assert set(names(tiny_shards, found)) == {f"d{i}" for i in range(20, 26)}
    for found in draw(lists, [row(tiny_shards, "t0")] * 50, 9).tolist():
        counts = np.unique(found, return_counts=True)[1]
        assert len(counts) == 6 and counts.max() == 2, "repeated evenly"


SCORED = {"t0": (["d20", "d21", "d22", "d23", "d24"], [9.5, 8.0, 7.0, 3.0, -1.0], {"d0": 10.0}),
          "t1": (["d25", "d26"], [-3.0, -1.5], {"d3": -2.0})}


def scored(shards, folder, rows=SCORED, distil: bool = False, **options) -> draws.NegativeLists:
    write_negatives(folder / "n.jsonl", ((qid, *row) for qid, row in rows.items()))
    config = NegativesConfig(str(folder / "n.jsonl"), **options)
    negative_rows.build(shards, "train", config, folder / "lists", distil=distil)
    return draws.NegativeLists(folder / "lists")


@pytest.mark.parametrize("options, first, second", [
    ({"filter_margin": 2.5}, {"d22", "d23", "d24"}, set()),  # up to 7.5; up to -4.5
    ({"filter_margin": 0.0}, {"d20", "d21", "d22", "d23", "d24"}, {"d25"}),
    ({"filter_ratio": 0.7}, {"d22", "d23", "d24"}, {"d25"}),  # up to 7; up to -2.6
    ({"filter_ratio": 1.0}, {"d20", "d21", "d22", "d23", "d24"}, {"d25"}),
    ({"filter_margin": 1.0, "filter_ratio": 0.5}, {"d23", "d24"}, {"d25"}),
])
def test_filters_by_hand(tiny_shards, tmp_path, options, first, second, capsys):
    lists = scored(tiny_shards, tmp_path, **options)
    for query, expected in (("t0", first), ("t1", second)):
        part = lists._sources[0].part(row(tiny_shards, query))
        assert set(names(tiny_shards, lists._sources[0].rows[part])) == expected
    counts = artifact.read(tmp_path / "lists").counts["sources"][0]
    assert counts["kept"] == len(first) + len(second)
    assert counts["kept"] + counts["above_margin"] + counts["above_ratio"] == 7
    assert f"{counts['kept']} negatives kept" in capsys.readouterr().err


def test_filters_need_scores(tiny_shards, tmp_path):
    unscored = {"t0": (["d20"], None, {"d0": 1.0}), "t1": (["d25"], [1.0], None)}
    with pytest.raises(InputError, match="n.jsonl: has no scores of negatives and positives, which filters need"):
        scored(tiny_shards, tmp_path, unscored, filter_margin=1.0)
    assert not (tmp_path / "lists").exists()
    scored(tiny_shards, tmp_path, {**unscored, "t2": (["d20"], [0.0], {"d6": 5.0})}, filter_margin=1.0)
    assert artifact.read(tmp_path / "lists").counts["sources"][0]["queries_without_scores"] == 2


def test_scores_come_with_what_is_drawn(tiny_shards, tmp_path):
    lists = scored(tiny_shards, tmp_path)
    expected = {query: dict(zip(docs, scores, strict=True)) for query, (docs, scores, _) in SCORED.items()}
    rows, scores = lists.draw(np.array([row(tiny_shards, "t0"), row(tiny_shards, "t1"), row(tiny_shards, "t3")]), 4,
                              KeyedRandom(1, np.arange(3)), 8)
    for query, docs, found in zip(("t0", "t1"), rows, scores, strict=False):
        assert [expected[query][name] for name in names(tiny_shards, docs)] == found.tolist()
    assert np.isnan(scores[2]).all(), "random documents have no score"
    pairs = dict(zip(map(tuple, lists.judged_pairs().tolist()), lists.pair_scores().tolist(), strict=True))
    known = {tiny_shards.queries("train").id(q): score for (q, _), score in pairs.items() if not np.isnan(score)}
    assert known == {"t0": 10.0, "t1": -2.0}


def test_distillation_trains_on_what_the_teacher_knows(tiny_shards, tmp_path, capsys):
    rows = {**SCORED, "t2": (["d20", "d21"], [1.0, 2.0], {"d1": 4.0}), "t4": (["d20"], None, None)}
    lists = scored(tiny_shards, tmp_path, rows, distil=True)
    queries = tiny_shards.queries("train").ids()
    pairs = {(queries[q], tiny_shards.docs.id(d)) for q, d in lists.judged_pairs().tolist()}
    assert pairs == {("t0", "d0"), ("t1", "d3"), ("t2", "d1")}, "t2 has further positives without scores"
    assert np.isfinite(lists.pair_scores()).all()
    assert "13 of 16 pairs are left out" in capsys.readouterr().err
    assert set(names(tiny_shards, lists.judged(row(tiny_shards, "t2")))) == {"d1", "d2", "d6"}, "still no negatives"
    with pytest.raises(InputError, match="has no scores, which distillation learns from"):
        scored(tiny_shards, tmp_path, {"t0": (["d20"], None, None)}, distil=True)
    with pytest.raises(InputError, match="no judged pair of the split 'train' has a teacher's scores"):
        scored(tiny_shards, tmp_path, {"t0": (["d20"], [1.0], None)}, distil=True)


def listed(shards, lists, query: str, source: int = 0) -> list[str]:
    found = lists._sources[source]
    return names(shards, found.rows[found.part(row(shards, query))])


def test_a_document_named_twice_counts_once(tiny_shards, build, tmp_path):
    assert listed(tiny_shards, build({"t0": ["d20", "d20", "d21", "d20", "d22", "d23"]}, depth=3), "t0") \
        == ["d20", "d21", "d22"]
    lists = scored(tiny_shards, tmp_path, {"t0": (["d20", "d21", "d20", "d22"], [3.0, 2.0, 1.0, 0.0], {"d0": 9.0})})
    assert listed(tiny_shards, lists, "t0") == ["d20", "d21", "d22"]
    assert lists._sources[0].scores.tolist() == [3.0, 2.0, 0.0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_filters_know_the_positives_of_every_source(tiny_shards, tmp_path, order):
    rows = [("t0", ["d20", "d21"], [9.9, 1.0], None), ("t0", ["d22", "d23"], [9.8, 1.0], {"d0": 10.0})]
    for i in order:
        write_negatives(tmp_path / f"n{i}.jsonl", [rows[i]])
    given = tuple(NegativeSource(str(tmp_path / f"n{i}.jsonl")) for i in order)
    negative_rows.build(tiny_shards, "train", NegativesConfig(sources=given, filter_margin=1.0), tmp_path / "lists")
    lists = draws.NegativeLists(tmp_path / "lists")
    assert [listed(tiny_shards, lists, "t0", place) for place in range(2)] == [[["d21"], ["d23"]][i] for i in order]


def test_one_query_without_scores_beside_filtered_ones_is_no_error(tiny_shards, tmp_path):
    rows = {"t0": (["d20"], [9.9], {"d0": 10.0}), "t1": (["d25"], [4.9], {"d3": 5.0}), "t2": (["d20"], None, None)}
    lists = scored(tiny_shards, tmp_path, rows, filter_margin=1.0)
    assert [listed(tiny_shards, lists, query) for query in rows] == [[], [], ["d20"]]


def test_distillation_counts_what_it_keeps(tiny_shards, tmp_path, capsys):
    rows = {"t0": (["d20", "d21"], [1.0, 2.0], {"d0": 4.0}), "t1": (["d25"], None, None)}
    lists = scored(tiny_shards, tmp_path, rows, distil=True)
    counts = artifact.read(tmp_path / "lists").counts
    assert counts["sources"][0]["kept"] == len(lists._sources[0].rows) == 2 and counts["without_negatives"] == 0
    assert "random passages" not in capsys.readouterr().err


@pytest.mark.parametrize("names_given, skip", [(["d20", "d21"], 30), (["d0"], 0)])
def test_a_source_with_nothing_at_its_ranks_is_refused(tiny_shards, tmp_path, names_given, skip):
    write_negatives(tmp_path / "n.jsonl", [("t0", names_given)])
    config = NegativesConfig(sources=(NegativeSource(str(tmp_path / "n.jsonl"), skip=skip, depth=200),))
    with pytest.raises(InputError, match=f"n.jsonl: has no documents between ranks {skip} and 200, judged positives"):
        negative_rows.build(tiny_shards, "train", config, tmp_path / "lists")
