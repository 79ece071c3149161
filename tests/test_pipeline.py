"""The whole cycle as one command on a tiny collection: every step runs, a second call runs none, a table appears."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from launching import ROOT, TINY, run

from lexmae import recipe
from lexmae.cycle.config import PipelineRecipe
from lexmae.data.negatives import read_negatives
from lexmae.errors import InputError
from lexmae.retrieval.runs import read_run

STEPS = ["prepare", "pretrain", "bm25", "bm25-evaluate", "bm25-negatives", "stage1", "stage1-docs", "stage1-queries",
         "stage1-index", "stage1-search", "stage1-evaluate", "stage1-train-encode", "stage1-mine",
         "stage1-negatives", "stage2", "stage2-docs", "stage2-queries", "stage2-index", "stage2-search",
         "stage2-evaluate"]


def write_recipes(folder: Path, collection: Path) -> None:
    """A pipeline of two stages with a model of two tiny layers."""
    hardware = {"deepspeed": "ds_configs/fp32_zero1.json", "data": "-", "output": "-"}
    optimization = {"lr": 1e-3, "batch": 4, "steps": 3}
    stages = [{"name": "stage1", "recipe": "stage.yaml", "negatives": "bm25", "mine_depth": 5},
              {"name": "stage2", "recipe": "stage2.yaml", "init": "stage1", "negatives": ["stage1", "bm25"],
               "mine_depth": 5}]
    files = {
        "pipeline": {"input": str(collection), "work": str(folder / "work"), "stages": stages,
                     "prepare": {"train_tokenizer": 140, "max_length": 28, "query_length": 10}},
        "pretrain": {**hardware, "model": TINY, "optimization": optimization},
        "stage": {**hardware, "negatives": {"per_query": 2, "depth": 5}, "optimization": optimization},
        "stage2": {**hardware, "negatives": {"per_query": 2, "sources": [{"path": "-"}, {"path": "-", "share": 2}]},
                   "optimization": optimization},
    }
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.mark.slow
def test_whole_cycle_then_nothing_to_do(beir_dir, tmp_path):
    write_recipes(tmp_path, beir_dir)
    first = run(["launch/pipeline.py", str(tmp_path)])
    assert [name for name in STEPS if f"] {name}: " in first] == STEPS
    work = tmp_path / "work"
    results = json.loads((work / "results.json").read_text(encoding="utf-8"))
    assert list(results["results"]) == ["BM25", "stage1", "stage2"]
    for row in results["results"].values():
        assert 0 <= row["MRR@10"] <= row["Recall@100"] <= 1 and row["terms_docs"] > 0 and row["index_bytes"] > 0
    table = (work / "results.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 5 and table[4].startswith("| stage2")
    metrics = {path: path.read_bytes() for path in work.glob("*/metrics.json")}

    second = run(["launch/pipeline.py", str(tmp_path)])
    assert second.count("finished before") == len(STEPS)
    assert metrics == {path: path.read_bytes() for path in work.glob("*/metrics.json")}


@pytest.mark.slow
def test_long_documents_go_through_the_cycle(long_dir, tmp_path):
    """A stage with the model's own hard passages as negatives; runs that are measured rank documents."""
    write_recipes(tmp_path, long_dir)
    pipeline = yaml.safe_load((tmp_path / "pipeline.yaml").read_text(encoding="utf-8"))
    pipeline |= {"pretrain": None, "evaluation": {"hits": 20}}
    pipeline["prepare"] |= {"split_documents": True, "stride": 11}
    pipeline["stages"][1] |= {"recipe": "second.yaml", "negatives": "stage1"}
    stage = yaml.safe_load((tmp_path / "stage.yaml").read_text(encoding="utf-8"))
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump({**stage, "model": TINY}), encoding="utf-8")
    (tmp_path / "second.yaml").write_text(yaml.safe_dump({**stage, "passages": "all"}), encoding="utf-8")
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline), encoding="utf-8")
    run(["launch/pipeline.py", str(tmp_path)])
    work = tmp_path / "work"
    documents = {f"D{i}" for i in range(12)}
    for file in ("bm25/run.trec", "stage1/run.trec", "stage2/run.trec"):
        ranked = [line.split()[2] for line in (work / file).read_text(encoding="utf-8").splitlines()]
        assert ranked and set(ranked) <= documents
    names = [name for line in (work / "stage1/negatives.jsonl").read_text(encoding="utf-8").splitlines()
             for name in json.loads(line)["negatives"]]
    assert all("#" in name for name in names) and len(set(names)) > 3
    means = json.loads((work / "stage2" / "metrics.json").read_text(encoding="utf-8"))["means"]
    assert 0 < means["MRR@10"] <= means["MRR@100"] <= 1


@pytest.mark.slow
def test_changed_settings_replace_nothing_unasked(beir_dir, tmp_path):
    write_recipes(tmp_path, beir_dir)
    run(["launch/pipeline.py", str(tmp_path), "--until", "prepare"])
    changed = ["launch/pipeline.py", str(tmp_path), "--until", "prepare", "--set", "prepare.max_length=20"]
    message = run(changed, code=2)
    assert "was made with other settings" in message.splitlines()[-1]
    run([*changed, "--redo"])
    manifest = json.loads((tmp_path / "work" / "shards" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["extra"]["max_length"] == 20


@pytest.mark.slow
def test_a_cycle_with_a_reranker(beir_dir, tmp_path):
    """It is trained behind BM25, reranks BM25's run, and scores the negatives of the stage that it teaches."""
    write_recipes(tmp_path, beir_dir)
    hardware = {"deepspeed": "ds_configs/fp32_zero1.json", "data": "-", "output": "-"}
    (tmp_path / "rerank.yaml").write_text(yaml.safe_dump(
        {**hardware, "max_length": 32, "negatives": {"per_query": 2, "depth": 5},
         "optimization": {"lr": 1e-3, "batch": 4, "micro_batch": 2, "steps": 3}}), encoding="utf-8")
    pipeline = tmp_path / "pipeline.yaml"
    content = yaml.safe_load(pipeline.read_text(encoding="utf-8"))
    content |= {"stages": [{"name": "taught", "recipe": "stage.yaml", "mine_depth": 5, "teacher": "reranker"}],
                "reranker": {"score_depth": 4, "rerank_depth": 6}}
    pipeline.write_text(yaml.safe_dump(content), encoding="utf-8")
    first = run(["launch/pipeline.py", str(tmp_path)])
    steps = ["reranker", "rerank", "rerank-evaluate", "bm25-scores", "taught"]
    assert [name for name in steps if f"] {name}: " in first] == steps
    work = tmp_path / "work"
    table = (work / "results.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["BM25", "rerank", "taught"]
    before, after = read_run(work / "bm25" / "run.trec"), read_run(work / "reranker" / "run.trec")
    assert all(before.documents(q)[6:] == after.documents(q)[6:] for q in before) and list(before) == list(after)
    assert any(before.documents(q)[:6] != after.documents(q)[:6] for q in before)
    rows = list(read_negatives(work / "reranker" / "bm25.jsonl"))
    assert rows and all(len(row.scores) == len(row.negatives) <= 4 and row.positives for row in rows)
    again = run(["launch/pipeline.py", str(tmp_path)])
    assert all(f"] {name}: finished before" in again for name in steps)


@pytest.mark.slow
def test_a_cycle_with_a_bi_encoder(beir_dir, tmp_path):
    """Its ranking is measured and mined, and its scores are in what the stage learns from."""
    pytest.importorskip("faiss", reason="faiss is absent: no dense index")
    write_recipes(tmp_path, beir_dir)
    pipeline, stage = tmp_path / "pipeline.yaml", tmp_path / "stage.yaml"
    content = yaml.safe_load(pipeline.read_text(encoding="utf-8"))
    content |= {"stages": [{"name": "taught", "recipe": "stage.yaml", "mine_depth": 5, "negatives": "bi_encoder",
                            "teacher": "bi_encoder"}],
                "bi_encoder": {"model": str(tmp_path / "work" / "pretrain" / "model"), "score_depth": 4}}
    pipeline.write_text(yaml.safe_dump(content), encoding="utf-8")
    recipe = yaml.safe_load(stage.read_text(encoding="utf-8")) | {"loss": {"distillation": "kl"}}
    stage.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run(["launch/pipeline.py", str(tmp_path)])
    work = tmp_path / "work"
    table = (work / "results.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["BM25", "bi_encoder", "taught"]
    rows = list(read_negatives(work / "bi_encoder" / "bi_encoder-scored.jsonl"))
    assert rows and all(row.positives and -20 <= min(row.scores) <= max(row.scores) <= 20 for row in rows)
    assert all(row.scores == sorted(row.scores, reverse=True) for row in rows), "the order of its own ranking"


# ---------------------------------------------------------------------------- what is refused before the first step


def pipeline_command():
    spec = importlib.util.spec_from_file_location("pipeline_command", ROOT / "launch" / "pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_split_that_is_not_there_is_missed_at_once(tmp_path, beir_dir):
    write_recipes(tmp_path, beir_dir)
    for key in ("split", "train_split", "more_splits"):
        value = "[nosuch]" if key == "more_splits" else "nosuch"
        with pytest.raises(InputError, match="has no queries of the split 'nosuch'; it has "):
            pipeline_command().main([str(tmp_path), "--list", "--set", f"evaluation.{key}={value}"])


@pytest.mark.parametrize("name", ["plain", "a #1: it's"])
def test_the_quickstart_names_its_folder_whatever_is_in_the_name(tmp_path, name):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "quickstart.sh", tmp_path / "launch")
    (tmp_path / "launch" / "install.sh").write_text("install_lexmae() { :; }\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    (tmp_path / name).mkdir()
    said = subprocess.run(["bash", "launch/quickstart.sh", name], cwd=tmp_path, check=True, text=True,
                          capture_output=True).stdout.splitlines()
    assert said[:3] == ["launch/pipeline.py", "recipes/toy", "--set"] and len(said) == 5
    config = recipe.load(ROOT / "recipes" / "toy" / "pipeline.yaml", PipelineRecipe, said[3:])
    assert (config.input, config.work) == (str(tmp_path / name), f"runs/toy-{name}")


def test_a_reranker_alone_is_trained_on_the_training_split(tmp_path, beir_dir):
    pretrained = {"input": str(beir_dir), "work": str(tmp_path / "w"), "prepare": {"train_tokenizer": 300}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(pretrained | {"reranker": {}}))
    with pytest.raises(InputError, match="has no queries of the split 'nosuch'; it has "):
        pipeline_command().main([str(tmp_path / "p.yaml"), "--list", "--set", "evaluation.train_split=nosuch"])


@pytest.mark.parametrize("ranks", [0, -2])
def test_fewer_ranks_than_one_are_refused(ranks):
    with pytest.raises(InputError, match=f"--ranks {ranks}: at least 1 is needed"):
        pipeline_command().count_ranks(Namespace(hostfile=None, ranks=ranks), 1)


def test_the_slots_of_a_hostfile_are_the_ranks(tmp_path):
    (tmp_path / "hosts").write_text("a slots=4\nb slots=2\n")
    count = pipeline_command().count_ranks
    assert count(Namespace(hostfile=str(tmp_path / "hosts"), ranks=None), 1) == 6
    assert count(Namespace(hostfile=None, ranks=None), 3) == 3 and count(Namespace(hostfile=None, ranks=None), 0) == 1
    with pytest.raises(InputError, match="hosts: has 6 slots, and --ranks says 16"):
        count(Namespace(hostfile=str(tmp_path / "hosts"), ranks=16), 1)
    with pytest.raises(InputError, match="no such hostfile"):
        count(Namespace(hostfile=str(tmp_path / "none"), ranks=None), 1)
