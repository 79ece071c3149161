"""Parts of a collection: what the chosen queries need is there, the rest is chosen by hash, nothing is invented."""

from __future__ import annotations

import pytest
from conftest import judgements, passages, queries

from lexmae.data import subset
from lexmae.data.corpus import Corpus
from lexmae.errors import InputError


def make(beir_dir, tmp_path, *options: str) -> Corpus:
    subset.main(["--input", str(beir_dir), "--output", str(tmp_path / "part"), *options])
    return Corpus.open(tmp_path / "part")


def test_a_part_holds_what_its_queries_need(beir_dir, tmp_path):
    part = make(beir_dir, tmp_path, "--queries", "train=6", "dev=2", "--documents", "20")
    whole = {passage.id: passage for passage in passages()}
    texts = {query.id: query for query in queries()}
    found = {passage.id: passage for passage in part.passages()}
    assert len(found) == 20 and all(whole[name] == passage for name, passage in found.items())
    assert list(found) == [name for name in whole if name in found], "in the order of the whole"
    for split, count in (("train", 6), ("dev", 2)):
        judged = part.qrels(split)
        assert len(judged) == count
        for name, row in judged.items():
            assert row == judgements()[split][name] and row.keys() <= found.keys()
        assert [texts[query.id] for query in part.queries(split)] == list(part.queries(split))


def test_the_choice_depends_on_ids_and_seed_alone(beir_dir, tmp_path):
    ids = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        part = make(beir_dir, tmp_path / name, "--queries", "dev=2", "--documents", "12", "--seed", seed)
        ids.append({passage.id for passage in part.passages()})
    assert ids[0] == ids[1] != ids[2]


def test_more_than_there_is(beir_dir, tmp_path):
    part = make(beir_dir, tmp_path, "--queries", "train=99", "--documents", "99")
    assert sum(1 for _ in part.passages()) == len(passages())
    assert "t9" not in part.qrels("train"), "it has no relevant document"


@pytest.mark.parametrize("options, reason", [
    (["--queries", "train=12", "--documents", "3"], "judged documents, more than --documents 3"),
    (["--queries", "test=3", "--documents", "9"], "no judged queries in split 'test'"),
    (["--queries", "train", "--documents", "9"], "SPLIT=N is needed"),
    (["--queries", "train=0", "--documents", "9"], "SPLIT=N is needed"),
    (["--queries", "train=3", "--documents", "0"], "--documents must be at least 1"),
])
def test_refusals(beir_dir, tmp_path, options, reason):
    with pytest.raises(InputError, match=reason):
        make(beir_dir, tmp_path, *options)
    assert not (tmp_path / "part").exists()
