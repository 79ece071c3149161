"""Mining never keeps a judged positive, counts what it did, and its commands refuse what cannot be meant."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

from lexmae.data.corpus import Passage, Query, read_negatives, write_beir, write_qrels
from lexmae.data.shards import prepare
from lexmae.errors import InputError
from lexmae.retrieval.mining import Statistics, bm25_run, mine_run
from lexmae.retrieval.runs import Run, read_run, write_run

TOOLS = Path(__file__).parents[1] / "tools"


def command(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_by_hand():
    run = Run.from_pairs({"q1": [("a", 4), ("b", 3), ("c", 2), ("d", 1)], "q2": [("a", 1)], "other": [("a", 1)]})
    qrels = {"q2": {"a": 1}, "q1": {"a": 1, "c": 2, "b": 0, "z": 1}, "q3": {"a": 1}, "q4": {"a": 0}}
    counts = Statistics()
    assert list(mine_run(run, qrels, 2, counts)) == [("q1", ["b", "d"], None, None, None)]
    assert counts == Statistics(queries=1, negatives=2, dropped_positives=3, without_negatives=2, unjudged=1)
    assert list(mine_run(run, qrels, 1)) == [("q1", ["b"], None, None, None)]
    with pytest.raises(InputError, match="at least 1"):
        list(mine_run(run, qrels, 0))


def test_no_positive_survives_and_the_order_stays():
    chance = random.Random(0)
    pairs = {f"q{i}": [(f"d{j}", chance.random()) for j in chance.sample(range(50), 30)] for i in range(40)}
    qrels = {f"q{i}": {f"d{j}": chance.choice([0, 1, 2]) for j in chance.sample(range(50), 10)} for i in range(40)}
    run, counts = Run.from_pairs(pairs), Statistics()
    rows = {query: negatives for query, negatives, *_ in mine_run(run, qrels, 12, counts)}
    for query, negatives in rows.items():
        ranked = [d for d, _ in sorted(pairs[query], key=lambda p: -p[1]) if qrels[query].get(d, 0) < 1]
        assert negatives == ranked[:12]
    assert counts.mean_negatives == sum(map(len, rows.values())) / len(rows) == 12


@pytest.fixture
def folder(tmp_path):
    passages = [Passage("p1", "Cats", "The cat sleeps all day."), Passage("p2", "Dogs", "A dog chases the cat."),
                Passage("p3", "Fish", "Fish swim in the sea."), Passage("p4", "", "Cats and dogs sleeping together")]
    queries = [Query("q1", "where does the cat sleep"), Query("q2", "swimming fish"), Query("p4", "cats and dogs")]
    qrels = {"train": {"q1": {"p1": 1}, "q2": {"p3": 1}}, "dev": {"p4": {"p2": 1}}}
    write_beir(tmp_path / "c", passages, queries, qrels)
    return tmp_path / "c"


def test_bm25_over_text(folder):
    ranked = bm25_run(folder, "train", 10)
    assert ranked.tokens == "standard" and list(ranked.run) == ["q1", "q2"]
    assert ranked.run.documents("q1")[0] == "p1" and set(ranked.run.documents("q1")) == {"p1", "p2", "p4"}
    assert ranked.run.documents("q2") == ["p3"]
    assert ranked.terms_queries == (4 + 2) / 2 and ranked.figures()["queries_per_second"] > 0


def test_bm25_over_the_token_ids_of_shards(folder, tmp_path):
    prepare(folder, tmp_path / "s", tokenizer=None, train_tokenizer=120, max_length=32, query_length=16)
    ranked = bm25_run(tmp_path / "s", "train", 10)
    assert ranked.tokens == "token ids" and ranked.run.documents("q2")[0] == "p3"


def test_command_mines_bm25(folder, tmp_path, capsys):
    command("mine")(["--bm25", str(folder), "--split", "train", "--qrels", str(folder / "qrels/train.tsv"),
                     "--output", str(tmp_path / "n.jsonl"), "--run-output", str(tmp_path / "r.trec"),
                     "--json", str(tmp_path / "b.json"), "--threads", "1"])
    assert {q: set(n) for q, n, *_ in read_negatives(tmp_path / "n.jsonl")} == {"q1": {"p2", "p4"}}
    assert read_run(tmp_path / "r.trec").documents("q1")[0] == "p1"
    assert {"queries_per_second", "terms_docs", "terms_queries", "index_bytes"} <= set(
        json.loads((tmp_path / "b.json").read_text()))
    assert "2 positives dropped; 1 judged queries without negatives" in capsys.readouterr().err


def test_command_leaves_out_the_query_itself(folder, tmp_path):
    arguments = ["--bm25", str(folder), "--split", "dev", "--threads", "1", "--run-output"]
    command("mine")([*arguments, str(tmp_path / "with.trec")])
    command("mine")([*arguments, str(tmp_path / "without.trec"), "--exclude-self"])
    assert "p4" in read_run(tmp_path / "with.trec").documents("p4")
    assert "p4" not in read_run(tmp_path / "without.trec").documents("p4")


def test_command_mines_a_run(tmp_path):
    write_run(tmp_path / "r", {"q": [("a", 3), ("b", 2), ("c", 1)]})
    write_qrels(tmp_path / "q.tsv", {"q": {"b": 1}})
    arguments = ["--run", str(tmp_path / "r"), "--qrels", str(tmp_path / "q.tsv"),
                 "--output", str(tmp_path / "n.jsonl")]
    command("mine")(arguments)
    assert list(read_negatives(tmp_path / "n.jsonl")) == [("q", ["a", "c"], None, None, None)]
    with pytest.raises(InputError, match="already exists"):
        command("mine")(arguments)
    command("mine")([*arguments, "--overwrite", "--depth", "1"])
    assert list(read_negatives(tmp_path / "n.jsonl")) == [("q", ["a"], None, None, None)]


@pytest.mark.parametrize(("arguments", "reason"), [
    ("--bm25 x --output n", "needs --split"), ("--run r --output n", "needs --qrels"), ("--run r", "nothing to write"),
    ("--run r --run-output n", "go with --bm25"),
    ("--bm25 x --split s --run-output n --passages", "goes with --run"),
    ("--run r --qrels q --output n --depth 0", "at least 1")])
def test_command_refuses(arguments, reason):
    with pytest.raises(InputError, match=reason):
        command("mine")(arguments.split())


def test_command_refuses_foreign_judgements(tmp_path):
    write_run(tmp_path / "r", {"q": [("a", 3)]})
    write_qrels(tmp_path / "q.tsv", {"other": {"b": 1}})
    with pytest.raises(InputError, match="belong together"):
        command("mine")(["--run", str(tmp_path / "r"), "--qrels", str(tmp_path / "q.tsv"), "--output",
                         str(tmp_path / "n")])
    assert not (tmp_path / "n").exists()


def test_a_run_of_passages_is_not_mined_as_one_of_documents(tmp_path):
    write_run(tmp_path / "r", {"q": [("D4#1", 3), ("D8#0", 2), ("D4#2", 1)]})
    write_qrels(tmp_path / "q.tsv", {"q": {"D4": 1}})
    arguments = ["--run", str(tmp_path / "r"), "--qrels", str(tmp_path / "q.tsv"), "--output", str(tmp_path / "n")]
    with pytest.raises(InputError, match="r: ranks passages of the judged documents: --passages is needed"):
        command("mine")(arguments)
    command("mine")([*arguments, "--passages"])
    assert [row.negatives for row in read_negatives(tmp_path / "n")] == [["D8#0"]]


def test_bm25_mines_the_passages_of_shards(long_shards, tmp_path):
    shards, negatives = str(long_shards.path), tmp_path / "n"
    arguments = ["--bm25", shards, "--split", "train", "--qrels", f"{shards}/qrels/train.tsv", "--output",
                 str(negatives), "--run-output", str(tmp_path / "r.trec"), "--threads", "1"]
    with pytest.raises(InputError, match="holds split documents, .* --passages is needed"):
        command("mine")(arguments)
    command("mine")([*arguments, "--passages"])
    rows = {row.qid: row for row in read_negatives(negatives)}
    assert all(len(long_shards.docs.rows(row.negatives)) for row in rows.values())
    assert rows and not any(name.startswith("D4#") for name in rows["t1"].negatives), "t1's positive is D4"
    command("mine")([*arguments[:4], "--run-output", str(tmp_path / "s.trec")])
    assert (tmp_path / "s.trec").read_bytes() == (tmp_path / "r.trec").read_bytes()


def test_a_querys_own_document_is_left_out_with_all_its_passages(tmp_path):
    write_run(tmp_path / "r", {"D1": [("D1#0", 3), ("D4#2", 2), ("D1#1", 1), ("D2#0", 0.5)]})
    write_qrels(tmp_path / "q.tsv", {"D1": {"D2": 1}})
    command("mine")(["--run", str(tmp_path / "r"), "--qrels", str(tmp_path / "q.tsv"), "--output",
                     str(tmp_path / "n"), "--passages", "--exclude-self"])
    assert [row.negatives for row in read_negatives(tmp_path / "n")] == [["D4#2"]]


def test_a_file_without_negatives_is_not_written(tmp_path):
    write_run(tmp_path / "r", {"q": [("a", 3)]})
    write_qrels(tmp_path / "q.tsv", {"q": {"a": 1}})
    with pytest.raises(InputError, match="r: no judged query has a document that is not judged relevant"):
        command("mine")(["--run", str(tmp_path / "r"), "--qrels", str(tmp_path / "q.tsv"), "--output",
                         str(tmp_path / "n")])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["q.tsv", "r"]


def test_mining_needs_no_torch():
    import subprocess

    code = "import sys, lexmae.retrieval.mining, lexmae.retrieval.engines, lexmae.retrieval.export\n" \
           "print(sorted({'torch', 'transformers', 'pyserini'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOOLS.parent)
    assert done.stdout.strip() == "[]", done.stderr
