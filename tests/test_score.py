"""Scoring: what transformers gives pair by pair, on any number of ranks, also after a stop; runs reranked."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import run
from test_kill import disturbed_file
from test_reranker import scorer
from test_search_tools import command
from threads import thread_hosts
from transformers import AutoModelForSequenceClassification

from lexmae import artifact, locks, ranks
from lexmae.data.negatives import Row, read_negatives, write_negatives
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.model.reranker import CrossEncoder
from lexmae.retrieval import blocks, metrics, score
from lexmae.retrieval.runs import read_run, write_run
from lexmae.retrieval.score import ScoreConfig

PAIR_LENGTH = 30
TRAIN = ScoreConfig("train", batch_tokens=200)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three parts for the twelve queries."""
    monkeypatch.setattr(score, "BLOCK", 5)


def write_reranker(path: Path, shards: Shards, **extra) -> Path:
    """A random cross-encoder for the shards, as training leaves one; ``extra`` replaces facts of its manifest."""
    special = {name: getattr(shards.special, name) for name in ("pad", "unk", "cls", "sep", "mask")}
    model = CrossEncoder(scorer(vocab=shards.vocab_size, special=special, max_position_embeddings=40))
    with artifact.create(path, "reranker") as draft:
        model.save(draft.path, shards.tokenizer_dir, PAIR_LENGTH)
        facts = {"tokenizer_hash": shards.manifest.extra["tokenizer_hash"], "pair_length": PAIR_LENGTH}
        draft.extra.update(facts | extra)
    return path


@pytest.fixture(scope="module")
def model(tiny_shards, tmp_path_factory) -> Path:
    return write_reranker(tmp_path_factory.mktemp("reranker") / "model", tiny_shards)


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    """Negatives of twelve queries of train, of up to nine documents, and of a query that the shards do not have."""
    random, path = np.random.default_rng(5), tmp_path_factory.mktemp("lists") / "n.jsonl"
    write_negatives(path, [Row(name, [f"d{i}" for i in random.permutation(41)[:count]])
                           for name, count in [*((f"t{i}", 4 + i % 6) for i in range(12)), ("elsewhere", 3)]])
    return path


@pytest.fixture(scope="module")
def one_by_one(model, tiny_shards):
    """(query, document) → score, by transformers, one pair of tokens put together in plain Python."""
    other = AutoModelForSequenceClassification.from_pretrained(model).eval()

    @functools.cache
    def compute(query: str, document: str, length: int = PAIR_LENGTH, split: str = "train") -> float:
        table, docs = tiny_shards.queries(split), tiny_shards.docs
        asked = table.tokens(int(table.rows([query])[0])).tolist()
        rest = docs.tokens(int(docs.rows([document])[0])).tolist()[1:]
        if len(asked) + len(rest) > length:
            rest = [*rest[:length - len(asked) - 1], rest[-1]]
        with torch.no_grad():
            return other(input_ids=torch.tensor([asked + rest]),
                         token_type_ids=torch.tensor([[0] * len(asked) + [1] * len(rest)])).logits.item()
    return compute


@pytest.fixture
def whole(model, shards_dir, lists, tmp_path) -> Path:
    """The result of a run that was not stopped."""
    score.score(model, shards_dir, tmp_path / "whole.jsonl", TRAIN, negatives=lists)
    return tmp_path / "whole.jsonl"


def test_a_lock_that_another_command_holds_stops_the_other_hosts(model, shards_dir, lists, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(ranks, "several_hosts", lambda: True)
    monkeypatch.setattr(ranks, "_exchange", lambda value: said.append(value) or [value, "ok"])
    with open(locks.lock_file(tmp_path / "s"), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being written by another process"):
            score.score(model, shards_dir, tmp_path / "s", TRAIN, negatives=lists)
    assert said == ["failed"]


def test_negatives_and_positives_have_the_scores_of_their_pairs(whole, lists, tiny_shards, one_by_one):
    given = {row.qid: row for row in read_negatives(lists)}
    found = list(read_negatives(whole))
    assert [row.qid for row in found] == [f"t{i}" for i in range(12)]
    for row in found:
        assert row.negatives == given[row.qid].negatives
        assert row.scores == pytest.approx([one_by_one(row.qid, name) for name in row.negatives], abs=1e-4)
        judged = {name for name, relevance in tiny_shards.qrels("train")[row.qid].items() if relevance > 0}
        assert (row.positives or {}).keys() == judged
        for name, value in (row.positives or {}).items():
            assert value == pytest.approx(one_by_one(row.qid, name), abs=1e-4)
    assert found[9].positives is None and len(found[2].positives) == 3
    assert len({value for row in found for value in row.scores}) > 40


def test_only_the_top_of_a_list(model, shards_dir, lists, whole, tmp_path):
    figures = score.score(model, shards_dir, tmp_path / "s", ScoreConfig("train", depth=3), negatives=lists)
    for row, full in zip(read_negatives(tmp_path / "s"), read_negatives(whole), strict=True):
        assert row.negatives == full.negatives[:3] and row.scores == pytest.approx(full.scores[:3], abs=1e-4)
        assert row.positives == pytest.approx(full.positives, abs=1e-4)
    assert figures["queries"] == 12 and figures["documents"] == 12 * 3 + 15


def test_the_size_of_batches_changes_nothing(model, shards_dir, lists, whole, tmp_path):
    score.score(model, shards_dir, tmp_path / "s", ScoreConfig("train", batch_tokens=1), negatives=lists)
    for row, full in zip(read_negatives(tmp_path / "s"), read_negatives(whole), strict=True):
        assert row.scores == pytest.approx(full.scores, abs=1e-4)


def test_another_length(model, shards_dir, lists, tmp_path, one_by_one):
    score.score(model, shards_dir, tmp_path / "s", ScoreConfig("train", max_length=16), negatives=lists)
    for row in list(read_negatives(tmp_path / "s"))[:4]:
        assert row.scores == pytest.approx([one_by_one(row.qid, name, 16) for name in row.negatives], abs=1e-4)


# ----------------------------------------------------------------------------------------------------- reranking


@pytest.fixture(scope="module")
def ranked(tmp_path_factory) -> Path:
    """A run for the queries of dev."""
    random, path = np.random.default_rng(6), tmp_path_factory.mktemp("run") / "run.trec"
    write_run(path, {f"v{i}": [(f"d{j}", 100.0 - place) for place, j in enumerate(random.permutation(41)[:7 + i])]
                     for i in range(5)})
    return path


@pytest.mark.parametrize("depth", [None, 4, 100])
def test_a_run_is_reranked_down_to_a_depth(model, shards_dir, ranked, tmp_path, one_by_one, depth):
    score.score(model, shards_dir, tmp_path / "new", ScoreConfig("dev", depth), run=ranked)
    before, after = read_run(ranked), read_run(tmp_path / "new")
    assert list(after) == list(before)
    for query in before:
        names = before.documents(query)
        cut = len(names) if depth is None else min(depth, len(names))
        expected = sorted(names[:cut], key=lambda name, q=query: -one_by_one(q, name, split="dev"))
        assert after.documents(query) == [*expected, *names[cut:]]
        scores = after.scores(query).tolist()
        assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)
        assert scores[:cut] == pytest.approx([one_by_one(query, name, split="dev") for name in expected], abs=1e-4)


def test_a_reranked_run_is_evaluated(model, shards_dir, tiny_shards, ranked, tmp_path, one_by_one):
    """Through the commands; the reciprocal rank worked out from the scores."""
    qrels = shards_dir / "qrels" / "dev.tsv"
    command("score", "--model", model, "--data", shards_dir, "--split", "dev", "--run", ranked, "--output",
            tmp_path / "new", "--json", tmp_path / "speed.json", "--batch-tokens", 500)
    command("evaluate", "--run", tmp_path / "new", "--qrels", qrels, "--json", tmp_path / "metrics.json")
    expected, before = [], read_run(ranked)
    for query, judged in tiny_shards.qrels("dev").items():
        order = sorted(before.documents(query), key=lambda name, q=query: -one_by_one(q, name, split="dev"))
        ranks = [1 + order.index(name) for name in judged if name in order]
        expected.append(1 / min(ranks) if ranks and min(ranks) <= 10 else 0)
    means = json.loads((tmp_path / "metrics.json").read_text())["means"]
    assert means["MRR@10"] == pytest.approx(np.mean(expected)) and np.mean(expected) > 0
    assert metrics.evaluate(before, tiny_shards.qrels("dev"), ["MRR@10"]).means["MRR@10"] != means["MRR@10"]
    speed = json.loads((tmp_path / "speed.json").read_text())
    assert speed["queries"] == 5 and speed["documents"] == 45 and speed["queries_per_second"] > 0


# ------------------------------------------------------------------------------------------------ split documents


def test_a_split_document_scores_as_its_best_passage(long_shards, tmp_path):
    reranker = write_reranker(tmp_path / "model", long_shards)
    docs = long_shards.documents
    table = docs.table.ids()
    passages = {name: [p for p in table if p.startswith(f"{name}#")] for name in docs.ids(np.arange(len(docs)))}
    assert len(passages["D4"]) > 3
    write_negatives(tmp_path / "n", [Row("t0", [*passages["D4"], "D4", "D2", *passages["D2"]]),
                                    Row("t2", ["D4"], passages=["D8#1"])])
    score.score(reranker, long_shards.path, tmp_path / "s", TRAIN, negatives=tmp_path / "n")
    first, second = read_negatives(tmp_path / "s")
    found = dict(zip(first.negatives, first.scores, strict=True))
    for name in ("D4", "D2"):
        assert found[name] == pytest.approx(max(found[p] for p in passages[name]), abs=1e-4)
    assert len({round(found[p], 3) for p in passages["D4"]}) > 3 and second.scores[0] != found["D4"]
    assert first.positives.keys() == {"D0", "D1"} and second.positives.keys() == {"D8"}
    assert first.passages is None and second.passages == ["D8#1"]


# ------------------------------------------------------------------------------------------------------- stopping


class Stopped(Exception):
    pass


def stop_early(monkeypatch, run, after: int = 9) -> None:
    """Let so many batches through before the run is stopped."""
    compute, seen = score._Scoring.compute, []

    def limited(*args):
        if len(seen) == after:
            raise Stopped
        seen.append(None)
        return compute(*args)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(score._Scoring, "compute", limited)
        run()


def test_a_stopped_run_goes_on_with_what_is_missing(model, shards_dir, lists, whole, tmp_path, monkeypatch, capsys):
    def run():
        score.score(model, shards_dir, tmp_path / "s", TRAIN, negatives=lists)

    stop_early(monkeypatch, run)
    partial = tmp_path / "s.partial"
    parts = sorted(partial.glob("part-*"))
    assert parts and len(parts) < 3 and not (tmp_path / "s").exists()
    (partial / ".part-000002.a1b2").write_text("half")
    stamps = [part.stat().st_mtime_ns for part in parts]
    stop_early(monkeypatch, run, 1)
    assert [part.stat().st_mtime_ns for part in parts] == stamps
    run()
    assert (tmp_path / "s").read_bytes() == whole.read_bytes() and not partial.exists()
    assert "parts are there already" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["depth", "source", "length"])
def test_what_was_begun_otherwise_is_discarded(model, shards_dir, lists, tmp_path, monkeypatch, change, capsys):
    stop_early(monkeypatch, lambda: score.score(model, shards_dir, tmp_path / "s", TRAIN, negatives=lists))
    source, config = lists, TRAIN
    if change == "depth":
        config = ScoreConfig("train", depth=2)
    elif change == "length":
        config = ScoreConfig("train", max_length=20)
    else:
        source = tmp_path / "other"
        source.write_text("".join(reversed(lists.read_text().splitlines(keepends=True))))
    score.score(model, shards_dir, tmp_path / "s", config, negatives=source)
    score.score(model, shards_dir, tmp_path / "fresh", config, negatives=source)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "fresh").read_bytes()
    assert "was begun from other inputs" in capsys.readouterr().err


@pytest.mark.parametrize("world", [2, 4])  # of four ranks one has nothing to do
def test_ranks_as_threads_make_what_one_makes(model, shards_dir, lists, whole, tmp_path, monkeypatch, world):
    local, barrier = threading.local(), threading.Barrier(world)

    @contextlib.contextmanager
    def ranks():
        yield local.rank, world, torch.device("cpu")

    monkeypatch.setattr(blocks, "ranks", ranks)
    monkeypatch.setattr(blocks, "is_main_rank", lambda: local.rank == 0)
    monkeypatch.setattr(blocks, "Hosts", thread_hosts(local, barrier))
    loaded = CrossEncoder.load(model)  # transformers cannot load in several threads at once
    monkeypatch.setattr(score.CrossEncoder, "load", lambda _: loaded)

    def work(rank: int) -> None:
        local.rank = rank
        score.score(model, shards_dir, tmp_path / "s", TRAIN, negatives=lists)

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(work, range(world)))
    assert (tmp_path / "s").read_bytes() == whole.read_bytes()


RANKS = """
import sys
from lexmae.retrieval import score
score.BLOCK = 5
score.score(*sys.argv[2:5], score.ScoreConfig("train", batch_tokens=200), negatives=sys.argv[5])
"""


@pytest.mark.slow
def test_ranks_as_processes_make_what_one_makes(model, shards_dir, lists, whole, tmp_path):
    """Started by the launcher, which puts the rank's own argument first."""
    program = tmp_path / "ranks.py"
    program.write_text(RANKS)
    run([str(program), *map(str, (model, shards_dir, tmp_path / "s", lists))], ranks=2)
    assert (tmp_path / "s").read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_killed_at_random_moments(model, shards_dir, lists, tmp_path):
    """Many queries, so that there are blocks to lose."""
    rows = list(read_negatives(lists))[:12]
    write_run(tmp_path / "run", {row.qid: [(f"d{i}", 41.0 - i) for i in range(41)] for row in rows})

    def start(output: Path) -> list[str]:
        return ["tools/score.py", "--model", str(model), "--data", str(shards_dir), "--split", "train", "--run",
                str(tmp_path / "run"), "--output", str(output)]

    assert disturbed_file(start, tmp_path, seed=4) > 0


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["negatives", "run"])
def test_a_score_that_is_not_finite_is_refused(model, shards_dir, lists, ranked, tmp_path, monkeypatch, kind):
    plain = CrossEncoder.forward
    monkeypatch.setattr(CrossEncoder, "forward", lambda self, **batch: plain(self, **batch) * torch.nan)
    source = {"negatives": lists} if kind == "negatives" else {"run": ranked}
    with pytest.raises(InputError, match=r"query '\w+': the score of document '\w+' is not finite; .*--precision fp32"):
        score.score(model, shards_dir, tmp_path / "s", TRAIN if kind == "negatives" else ScoreConfig("dev"), **source)
    assert not (tmp_path / "s").exists()


def test_refusals(model, model_dir, shards_dir, tiny_shards, lists, ranked, whole, tmp_path):
    def refused(reason: str, config: ScoreConfig = TRAIN, with_model: Path = model, data: Path = shards_dir,
                output: Path = tmp_path / "s", **source) -> None:
        with pytest.raises(InputError, match=reason):
            score.score(with_model, data, output, config, **(source or {"negatives": lists}))

    refused("is of kind 'model', but 'reranker' is needed here", with_model=model_dir)
    refused("no queries of the split 'test'; it has dev, train", ScoreConfig("test"))
    refused("no such shards", data=tmp_path / "absent")
    refused("already exists", output=whole)
    refused("no such model folder", with_model=tmp_path / "absent")
    refused("names no query of the split 'dev'", ScoreConfig("dev"))
    refused("unknown query 'v0'", run=ranked)
    refused("reads 40 tokens, which is less than a length of pairs of 41", ScoreConfig("train", max_length=41))
    refused("leaves no room for a document beside a query of 10", ScoreConfig("train", max_length=12))
    other = write_reranker(tmp_path / "other", tiny_shards, tokenizer_hash="0" * 64)
    refused("was trained with another tokenizer", with_model=other)
    plain = shutil.copytree(model_dir, tmp_path / "plain")
    (plain / artifact.MANIFEST).unlink()
    refused("is no finished cross-encoder", with_model=plain)
    write_run(tmp_path / "unknown", {"t0": [("nowhere", 1.0)]})
    refused("unknown document 'nowhere'", run=tmp_path / "unknown")
    assert not (tmp_path / "s").exists() and not (tmp_path / "s.partial").exists()
    score.score(model, shards_dir, whole, ScoreConfig("train", depth=1), negatives=lists, overwrite=True)
    assert all(len(row.negatives) == 1 for row in read_negatives(whole))
