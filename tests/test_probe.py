"""Probes: what is chosen, figures against the retrieval measures, ranks that share the texts, real runs."""

from __future__ import annotations

import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import judgements, write_model
from launching import TINY, log, run

from lexmae import artifact, recipe
from lexmae.config import FinetuneRecipe, LoggingConfig, ProbeConfig
from lexmae.errors import InputError
from lexmae.model.encoder import SparseEncoder
from lexmae.retrieval import metrics
from lexmae.retrieval.runs import Run
from lexmae.train import probe, session
from lexmae.train.engine import Engine

FOUR = ProbeConfig(every=2, split="train", queries=4, documents=20)


# -------------------------------------------------------------------------------------------------- the choice


def test_judged_documents_are_among_those_that_are_searched(tiny_shards):
    found = probe.select(FOUR, tiny_shards, seed=1)
    queries = tiny_shards.queries("train").ids(found.queries)
    documents = tiny_shards.docs.ids(found.texts)
    assert len(set(queries)) == 4 and len(set(documents)) == 20 == len(documents) and documents == sorted(documents)
    assert found.owner.tolist() == list(range(20)) and "t9" not in queries  # t9 has no positive
    for query, row in zip(queries, found.relevant, strict=True):
        judged = judgements()["train"][query]
        assert set(judged) <= set(documents)
        assert {documents[i] for i in np.flatnonzero(row)} == {name for name, grade in judged.items() if grade > 0}


def test_the_choice_is_the_seeds(tiny_shards):
    def chosen(seed: int) -> tuple:
        found = probe.select(FOUR, tiny_shards, seed)
        return found.queries.tolist(), found.texts.tolist()

    assert chosen(1) == chosen(1)
    assert len({str(chosen(seed)) for seed in range(4)}) == 4


def test_more_than_there_is_takes_all(tiny_shards):
    found = probe.select(ProbeConfig(every=1, split="dev", queries=99, documents=999), tiny_shards, 3)
    assert sorted(tiny_shards.queries("dev").ids(found.queries)) == [f"v{i}" for i in range(5)]
    assert sorted(found.texts.tolist()) == list(range(41))


def test_queries_whose_judged_documents_do_not_fit_are_passed_over(tiny_shards):
    for seed in range(5):
        found = probe.select(ProbeConfig(every=1, split="train", queries=13, documents=3), tiny_shards, seed)
        assert 1 <= len(found.queries) and len(found.texts) <= 3 and found.relevant.any(1).all()
    found = probe.select(ProbeConfig(every=1, split="train", queries=13, documents=1), tiny_shards, 0)
    assert len(found.texts) == 1 and not {"t2", "t5"} & set(tiny_shards.queries("train").ids(found.queries))


def test_nothing_to_measure_is_refused(tiny_shards, monkeypatch):
    with pytest.raises(InputError, match="no queries of the split 'test', which probe.split names; it has dev, train"):
        probe.check(ProbeConfig(every=1, split="test"), tiny_shards)
    probe.check(ProbeConfig(every=1), tiny_shards)
    monkeypatch.setattr(type(tiny_shards), "qrels", lambda self, split: {"v1": {"d1": 0}})
    with pytest.raises(InputError, match="no relevant document for any query of the split 'dev'"):
        probe.check(ProbeConfig(every=1), tiny_shards)


def test_judged_documents_that_never_fit_are_refused(tiny_shards, monkeypatch):
    monkeypatch.setattr(type(tiny_shards), "qrels", lambda self, split: {"v1": {"d1": 1, "d2": 1}})
    with pytest.raises(InputError, match="probe.documents 1: the judged documents of no query fit"):
        probe.select(ProbeConfig(every=1, documents=1), tiny_shards, 0)


# ------------------------------------------------------------------------------------------------- the figures


def expected(scores: torch.Tensor, relevant: np.ndarray) -> dict[str, float]:
    """The retrieval measures of the same ranking, through its own code."""
    names = [f"d{i:04d}" for i in range(scores.shape[1])]
    ranked = {f"q{q}": [(names[d], s) for d, s in enumerate(row) if s > 0] for q, row in enumerate(scores.tolist())}
    qrels = {f"q{q}": {names[d]: int(r) for d, r in enumerate(row)} for q, row in enumerate(relevant)}
    means = metrics.evaluate(Run.from_pairs(ranked), qrels, ("MRR@10", "Recall@100")).means
    return {"probe_mrr_10": means["MRR@10"], "probe_recall_100": means["Recall@100"]}


@pytest.mark.parametrize("documents", [3, 30, 300])
def test_measures_are_those_of_the_retrieval_room(documents):
    random = np.random.default_rng(documents)
    for _ in range(5):
        scores = torch.from_numpy(random.integers(-2, 9, (20, documents)) / 3).float()  # many equal, many not found
        relevant = random.random((20, documents)) < 0.05
        relevant[np.arange(20), random.integers(0, documents, 20)] = True
        assert probe.measures(scores, torch.from_numpy(relevant)) == pytest.approx(expected(scores, relevant))


def test_what_is_not_a_number_is_not_found():
    nothing = probe.measures(torch.full((2, 3), torch.nan), torch.ones(2, 3, dtype=torch.bool))
    assert nothing == {"probe_mrr_10": 0.0, "probe_recall_100": 0.0}


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_random_state_are_put_back(training):
    engine = SimpleNamespace(module=torch.nn.Sequential(torch.nn.Dropout()), device=torch.device("cpu"))
    engine.module.train(training)
    state = torch.get_rng_state()
    with pytest.raises(OSError), Engine.evaluating(engine):
        assert not engine.module[0].training and not torch.is_grad_enabled()
        torch.rand(3)
        raise OSError
    assert engine.module[0].training == training and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------ one and two ranks


def make(shards, encoder, config: ProbeConfig = FOUR, rank: int = 0, world: int = 1, gather=lambda rows: rows,
         **more):
    """A probe with an engine of a few lines, and what it kept."""
    kept = []
    engine = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"), evaluating=torch.no_grad,
                             module=encoder)
    found = probe.Probe(config, shards, probe.select(config, shards, 1), 5, engine,
                        lambda engine, text, side: engine.module(**text.arguments()), gather,
                        lambda step, figures: kept.append((step, figures["probe_mrr_10"])), **more)
    return found, kept


def vectors(shards, encoder, table, rows) -> torch.Tensor:
    """Each text encoded alone, without padding."""
    found = []
    for row in rows.tolist():
        ids = torch.from_numpy(table.tokens(row).astype(np.int64))[None]
        text = ~torch.isin(ids, torch.tensor(shards.special.structural))
        types = (torch.arange(ids.shape[1]) >= table.first_length(row)).long()[None]
        with torch.no_grad():
            found.append(encoder(ids, torch.ones_like(ids), text, types)[0])
    return torch.stack(found)


@pytest.fixture(scope="module")
def encoder(model_dir) -> SparseEncoder:
    return SparseEncoder.load(model_dir).eval()


def test_figures_are_those_of_the_model(tiny_shards, encoder):
    found, kept = make(tiny_shards, encoder)
    assert found(1) == {} and kept == []
    figures = found(2)
    queries = vectors(tiny_shards, encoder, tiny_shards.queries("train"), found.selection.queries)
    docs = vectors(tiny_shards, encoder, tiny_shards.docs, found.selection.texts)
    wanted = expected(queries @ docs.T, found.selection.relevant)
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted)
    assert figures["probe_terms_docs"] == pytest.approx((docs > 0).sum(1).float().mean().item())
    assert figures["probe_terms_queries"] == pytest.approx((queries > 0).sum(1).float().mean().item())
    assert kept == [(2, figures["probe_mrr_10"])]
    assert found(4)["probe_mrr_10"] == found(5)["probe_mrr_10"] == figures["probe_mrr_10"]  # 5 is the last step
    assert len(kept) == 1  # as good as the best is not better


@pytest.mark.parametrize("terms", [5, 40, 10**6])
def test_logits_are_lowered_until_few_terms_are_left(tiny_shards, model_dir, encoder, terms):
    raw = make(tiny_shards, encoder)[0](2)
    figures = make(tiny_shards, encoder, terms=terms)[0](2)
    assert figures["probe_terms_docs"] == pytest.approx(min(terms, raw["probe_terms_docs"]), abs=0.11)
    assert (figures["probe_offset"] > 0) == (terms < raw["probe_terms_docs"])
    lowered = SparseEncoder.load(model_dir).eval()
    with torch.no_grad():
        lowered.lm.get_output_embeddings().bias -= figures["probe_offset"]
    again = make(tiny_shards, lowered)[0](2)
    for name in ("probe_mrr_10", "probe_recall_100", "probe_terms_docs", "probe_terms_queries"):
        assert figures[name] == pytest.approx(again[name], rel=0.01), name


@pytest.mark.parametrize("terms", [None, 7])
@pytest.mark.parametrize("queries, documents", [(4, 20), (5, 33)])
def test_two_ranks_measure_what_one_measures(tiny_shards, encoder, queries, documents, terms):
    """Both encode as often as the other."""
    config = ProbeConfig(every=1, split="train", queries=queries, documents=documents)
    alone = make(tiny_shards, encoder, config, terms=terms)[0](1)
    barrier, parts, results, calls = threading.Barrier(2), [None, None], [None, None], [0, 0]

    def work(rank: int) -> None:
        def gather(rows: torch.Tensor) -> torch.Tensor:
            parts[rank] = rows
            barrier.wait()
            whole = torch.cat(parts)
            barrier.wait()
            return whole

        found, _ = make(tiny_shards, encoder, config, rank, 2, gather, terms=terms)
        encode = found.encode

        def counted(engine, text, side):
            calls[rank] += 1
            return encode(engine, text, side)

        found.encode = counted
        results[rank] = found(1)

    ranks = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in ranks]
    [thread.join() for thread in ranks]
    assert calls[0] == calls[1] > 0
    for result in results:
        assert {k: v for k, v in result.items() if k != "probe_seconds"} == pytest.approx(
            {k: v for k, v in alone.items() if k != "probe_seconds"})


def test_a_document_is_as_good_as_its_best_passage(long_shards, tmp_path):
    encoder = SparseEncoder.load(write_model(tmp_path / "model", long_shards.path)).eval()
    config = ProbeConfig(every=1, split="dev", queries=3, documents=25)
    found, _ = make(long_shards, encoder, config)
    chosen = found.selection
    documents = [name.partition("#")[0] for name in long_shards.docs.ids(chosen.texts)]
    names = sorted(set(documents))
    assert [names[i] for i in chosen.owner] == documents and 3 <= len(names) < len(documents) <= 25
    for name in names:  # whole documents
        assert documents.count(name) == sum(n.startswith(f"{name}#") for n in long_shards.docs.ids())
    queries = vectors(long_shards, encoder, long_shards.queries("dev"), chosen.queries)
    texts = queries @ vectors(long_shards, encoder, long_shards.docs, chosen.texts).T
    scores = torch.stack([texts[:, [d == name for d in documents]].amax(1) for name in names], dim=1)
    figures, wanted = found(1), expected(scores, chosen.relevant)
    assert {key: figures[key] for key in wanted} == pytest.approx(wanted)


# ----------------------------------------------------------------------------------------------- the best model

def keep(path, value: float = 0.25) -> None:
    with artifact.create(path, "model", config={"lr": 0.1}, overwrite=True) as draft:
        draft.extra["probe"] = {"probe_mrr_10": value, "step": 3}


def test_the_best_before_counts_only_with_the_same_settings(tmp_path):
    assert probe.best_before(tmp_path / "best", lambda config: True) == -1
    keep(tmp_path / "best")
    assert probe.best_before(tmp_path / "best", lambda config: config == {"lr": 0.1}) == 0.25
    assert probe.best_before(tmp_path / "best", lambda config: config == {"lr": 0.2}) == -1


def test_which_settings_are_the_same():
    def settings(**changes) -> dict:
        return session._comparable(recipe.to_dict(FinetuneRecipe("d", **({"output": "o"} | changes))))

    base = settings(probe=FOUR)
    assert base == settings(probe=ProbeConfig(9, "train", 4, 20), output="p", deepspeed="x", logging=LoggingConfig(3))
    for changes in ({"probe": ProbeConfig(2, "dev", 4, 20)}, {"probe": ProbeConfig(2, "train", 5, 20)},
                    {"probe": FOUR, "passages": "all"}):  # fmt: skip
        assert settings(**changes) != base


def test_a_best_model_that_was_being_replaced_gets_its_name_back(tmp_path):
    keep(tmp_path / "best")
    (tmp_path / "best").rename(tmp_path / "best.old")
    assert probe.best_before(tmp_path / "best", lambda config: True) == 0.25
    assert artifact.exists(tmp_path / "best") and not (tmp_path / "best.old").exists()


# --------------------------------------------------------------------------------------------------- real runs

KINDS = {
    "pretrain": {"optimization": {"lr": 1e-3, "batch": 8, "micro_batch": 2, "steps": 6, "clip": 1.0}},
    "finetune": {"optimization": {"lr": 1e-3, "batch": 4, "micro_batch": 5, "steps": 6, "clip": 1.0},
                 "negatives": {"per_query": 2}},
}
TIMED = {"tokens_per_second", "data_wait", "seconds_per_step", "tflops", "probe_seconds"}


def start(folder, kind: str, shards, every: int, *arguments: str) -> list[dict]:
    """Two ranks under ZeRO-3 with dropout; returns the log without times."""
    size = {**TINY["size"], "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    values = {"data": str(shards), "output": str(folder), "deepspeed": "ds_configs/fp32_zero3.json",
              "model": {**TINY, "size": size}, "logging": {"every": 1, "checkpoint_every": 3}, **KINDS[kind],
              "probe": {"every": every, "queries": 5, "documents": 33}}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    run([f"launch/{kind}.py", str(path), *arguments], ranks=2)
    return [{k: v for k, v in line.items() if k not in TIMED} for line in log(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_probes_change_nothing_and_go_on_after_a_stop(kind, shards_dir, tiny_shards, tmp_path):
    without, whole = start(tmp_path / "without", kind, shards_dir, 0), start(tmp_path / "run", kind, shards_dir, 2)
    assert [line for line in whole if "loss" in line] == without
    probes = [line for line in whole if "loss" not in line]
    assert [line["step"] for line in probes] == [2, 4, 6]
    best = artifact.read(tmp_path / "run" / "best", "model")
    top = max(probes, key=lambda line: line["probe_mrr_10"])  # the first of equal ones
    assert best.extra["probe"]["step"] == best.counts["steps"] == top["step"]
    assert best.extra["probe"]["probe_mrr_10"] == top["probe_mrr_10"]
    last, _ = make(tiny_shards, SparseEncoder.load(tmp_path / "run" / "model").eval(),
                   ProbeConfig(every=1, queries=5, documents=33))
    last.selection = probe.select(last.config, tiny_shards, 42)
    again = last(1)
    for name in ("probe_mrr_10", "probe_recall_100", "probe_terms_docs", "probe_terms_queries"):
        assert probes[-1][name] == pytest.approx(again[name], rel=0.05), name

    if kind == "pretrain":  # as a kill would leave it
        shutil.rmtree(tmp_path / "run" / "model")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
        assert start(tmp_path / "run", kind, shards_dir, 2, "--resume", "auto") == whole
        again = artifact.read(tmp_path / "run" / "best", "model")
        assert (again.fingerprint, again.extra["probe"]) == (best.fingerprint, best.extra["probe"])


@pytest.mark.slow
def test_a_written_model_has_no_more_terms_than_wanted(shards_dir, tiny_shards, tmp_path):
    values = {"data": str(shards_dir), "deepspeed": "ds_configs/fp32_zero1.json", "model": dict(TINY),
              "logging": {"every": 1, "checkpoint_every": 0}, **KINDS["pretrain"]}
    for name, terms in (("raw", None), ("levelled", 6)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, "output": str(tmp_path / name),
                                        "bottleneck": {"active_terms": terms}}), encoding="utf-8")
        run(["launch/pretrain.py", str(path)])
    found = {name: SparseEncoder.load(tmp_path / name / "model").eval() for name in ("raw", "levelled")}
    rows = np.arange(len(tiny_shards.docs))
    count = {name: (vectors(tiny_shards, encoder, tiny_shards.docs, rows) > 0).sum(1).float()
             for name, encoder in found.items()}
    wrote = artifact.read(tmp_path / "levelled" / "model", "model")
    assert count["raw"].mean() > 20 and wrote.extra["bias_added"] < 0
    assert count["levelled"][count["raw"] > 0].mean() == pytest.approx(6, abs=0.1)
    weights = {name: dict(encoder.lm.named_parameters()) for name, encoder in found.items()}
    bias = found["raw"].lm.get_output_embeddings().bias
    for name, weight in weights["raw"].items():
        added = wrote.extra["bias_added"] if weight is bias else 0.0
        assert torch.allclose(weights["levelled"][name], weight + added, atol=1e-6), name
