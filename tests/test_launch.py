"""Training as users start it: real deepspeed processes, compared with one process; resume; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from launching import TINY, log, reseal, run
from safetensors.torch import load_file

from lexmae import artifact
from lexmae.data.negatives import write_negatives

STEPS = 6
SECTIONS = {
    "pretrain": {"optimization": {"lr": 1e-3, "batch": 8, "micro_batch": 2, "steps": STEPS, "clip": 1.0}},
    "finetune": {"optimization": {"lr": 1e-3, "batch": 4, "micro_batch": 5, "steps": STEPS, "clip": 1.0},
                 "negatives": {"per_query": 2},
                 "loss": {"lambda_docs": 0.01, "lambda_ramp": 0.5, "active_terms": {"docs": 20, "queries": 5}}},
    "rerank": {"optimization": {"lr": 1e-3, "batch": 4, "micro_batch": 1, "steps": STEPS, "clip": 1.0},
               "negatives": {"per_query": 2}, "max_length": 32},
}


def write_recipe(folder: Path, kind: str, shards: Path, **changes) -> Path:
    """A recipe for a tiny model; ``changes`` replace whole sections."""
    values = {"data": str(shards), "output": str(folder / "run"), "deepspeed": "ds_configs/fp32_zero1.json",
              "model": TINY, "logging": {"every": 1, "checkpoint_every": 3}, **SECTIONS[kind], **changes}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


BUDGETS = {"pretrain": 60, "finetune": 84, "rerank": 96}
"""Tokens of a micro-batch: two of the longest texts or a little more, the pairs of one query."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(shards_dir, tmp_path_factory) -> dict[str, Path]:
    """Each kind trained by one process without the launcher."""
    folders = {}
    for kind in SECTIONS:
        folder = tmp_path_factory.mktemp(kind)
        run([f"launch/{kind}.py", str(write_recipe(folder, kind, shards_dir))])
        folders[kind] = folder / "run"
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["texts", "tokens", "packed"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("kind", SECTIONS)
def test_two_ranks_learn_what_one_learns(kind, stage, spread, alone, shards_dir, tmp_path):
    """However the batch is cut into micro-batches, whose number differs between steps where tokens are counted; with
    and without padding."""
    changes = {"deepspeed": f"ds_configs/fp32_zero{stage}.json"}
    if spread == "packed" and kind == "rerank":
        pytest.skip("pairs are padded")
    if spread == "packed":
        changes["model"] = {**TINY, "packing": "on"}
    if spread != "texts":
        changes["optimization"] = {**SECTIONS[kind]["optimization"], "micro_tokens": BUDGETS[kind]}
        del changes["optimization"]["micro_batch"]
    recipe = write_recipe(tmp_path, kind, shards_dir, **changes)
    run([f"launch/{kind}.py", str(recipe)], ranks=2)
    one, two = log(alone[kind]), log(tmp_path / "run")
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    assert spread != "packed" or all(line["padding"] == 0 for line in two)
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "lr", *(k for k in a if k.startswith(("loss_", "flops", "terms", "lambda")))):
            assert b[name] == pytest.approx(a[name], abs=1e-4, rel=1e-4), name
    expected, got = weights(alone[kind]), weights(tmp_path / "run")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def assert_same_losses(one: list[dict], two: list[dict]) -> None:
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "grad_norm"):
            assert b[name] == pytest.approx(a[name], abs=1e-4, rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), [("pretrain", 3), ("finetune", 2), ("rerank", 3)])
def test_recomputed_layers_learn_the_same(kind, stage, alone, shards_dir, tmp_path):
    """On two ranks; the log has rates, and DeepSpeed's profiler writes its account of a step."""
    model = {**TINY, "activation_checkpointing": True, **({} if kind == "rerank" else {"packing": "on"})}
    recipe = write_recipe(tmp_path, kind, shards_dir, model=model, deepspeed=f"ds_configs/fp32_zero{stage}.json",
                          logging={"every": 1, "checkpoint_every": 0, "profile_step": 2, "peak_tflops": 0.5})
    run([f"launch/{kind}.py", str(recipe)], ranks=2)
    found = log(tmp_path / "run")
    assert_same_losses(log(alone[kind]), found)
    assert all(line["tflops"] > 0 and line["mfu"] == pytest.approx(2 * line["tflops"]) for line in found)
    assert "DeepSpeed Flops Profiler" in (tmp_path / "run" / "flops.txt").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a CPU")
def test_compiled_layers_learn_the_same(alone, shards_dir, tmp_path):
    recipe = write_recipe(tmp_path, "pretrain", shards_dir, model={**TINY, "compile": True})
    run(["launch/pretrain.py", str(recipe)])
    assert_same_losses(log(alone["pretrain"]), log(tmp_path / "run"))
    expected, got = weights(alone["pretrain"]), weights(tmp_path / "run")
    assert expected.keys() == got.keys()


def scored_negatives(folder: Path, name: str, first: int) -> dict:
    """A source of ten scored negatives for every query."""
    write_negatives(folder / f"{name}.jsonl", (
        (f"t{i}", [f"d{(first + 3 * i + j) % 41}" for j in range(10)], [0.3 * j - i for j in range(10)],
         {f"d{j}": 5.0 for j in range(41)}) for i in range(13)))
    return {"path": str(folder / f"{name}.jsonl"), "depth": 9}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_distil_what_one_distils(stage, shards_dir, tmp_path):
    """Distillation from stored scores of two sources, pruned, L1: whole on one rank, in chunks on two."""
    sources = [scored_negatives(tmp_path, "near", 1), {**scored_negatives(tmp_path, "far", 20), "share": 2.0}]
    changes = {"negatives": {"per_query": 3, "sources": sources, "filter_margin": 0.5},
               "loss": {"lambda_docs": 0.001, "regulariser_docs": "l1", "regulariser_queries": "df_flops",
                        "top_k_docs": 20, "contrastive_weight": 0.2, "distillation": "kl"}}
    whole = {**SECTIONS["finetune"]["optimization"], "micro_batch": None}
    recipe = write_recipe(tmp_path / "one", "finetune", shards_dir, optimization=whole, **changes)
    run(["launch/finetune.py", str(recipe)])
    changes["deepspeed"] = f"ds_configs/fp32_zero{stage}.json"
    recipe = write_recipe(tmp_path / "two", "finetune", shards_dir, **changes)
    run(["launch/finetune.py", str(recipe)], ranks=2)
    one, two = log(tmp_path / "one" / "run"), log(tmp_path / "two" / "run")
    assert len(one) == len(two) == STEPS and one[0]["loss_distillation"] > 0
    for a, b in zip(one, two, strict=True):
        for name in (k for k in a if k.startswith(("loss", "l1", "df_flops", "terms", "grad"))):
            assert b[name] == pytest.approx(a[name], abs=1e-4, rel=1e-4), name


@pytest.mark.slow
def test_models_have_a_card(alone):
    for kind, folder in alone.items():
        if kind == "rerank":  # cards are those of lexicon encoders
            assert not (folder / "model" / "README.md").exists()
            continue
        text, last = (folder / "model" / "README.md").read_text(encoding="utf-8"), log(folder)[-1]
        assert f"| Loss | {last['loss']:.4g} |" in text and "| Documents | 41 |" in text and "seed: 42" in text
        assert ("| Active terms of a document |" in text) == (kind == "finetune")
        artifact.verify(folder / "model")


@pytest.mark.slow
def test_losses_fall(alone):
    """What is learned, without the regularisers, whose weight grows; that a cross-encoder learns has its own test."""
    for kind, name in (("pretrain", "loss"), ("finetune", "loss_contrastive")):
        losses = [line[name] for line in log(alone[kind])]
        assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage", "packed"), [("pretrain", 2, False), ("finetune", 3, False),
                                                     ("pretrain", 0, False), ("rerank", 3, False),
                                                     ("pretrain", 1, True), ("finetune", 2, True)])
def test_resumed_run_equals_one_that_never_stopped(kind, stage, packed, shards_dir, tmp_path):
    """With dropout; without padding and with a budget of tokens where ``packed``."""
    model = {**TINY, "size": {**TINY["size"], "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}}
    changes = {"model": model, "deepspeed": f"ds_configs/fp32_zero{stage}.json"}
    if packed:
        changes["model"] = {**model, "packing": "on"}
        changes["optimization"] = {**SECTIONS[kind]["optimization"], "micro_tokens": BUDGETS[kind]}
        del changes["optimization"]["micro_batch"]
    recipe = write_recipe(tmp_path, kind, shards_dir, **changes)
    run([f"launch/{kind}.py", str(recipe)], ranks=2)
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole)
    # As a kill would leave it: no model, the newest checkpoint unfinished, the log ahead of the last finished one.
    shutil.rmtree(tmp_path / "run" / "model")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-6").rename(checkpoints / "step-6.partial")
    (checkpoints / "step-6.partial" / artifact.MANIFEST).unlink()
    run([f"launch/{kind}.py", str(recipe), "--resume", "auto"], ranks=2)
    timed = {"tokens_per_second", "data_wait", "seconds_per_step", "tflops"}
    for before, after in zip(log(whole), log(tmp_path / "run"), strict=True):
        assert {k: v for k, v in after.items() if k not in timed} == {k: v for k, v in before.items() if k not in timed}
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name]), name


@pytest.mark.slow
def test_encoding_on_two_ranks_equals_one(alone, shards_dir, tmp_path):
    for ranks in (0, 2):
        run(["tools/encode.py", "--model", str(alone["finetune"] / "model"), "--data", str(shards_dir), "--side",
             "docs", "--output", str(tmp_path / f"vectors{ranks}")], ranks=ranks)
    one, two = (artifact.read(tmp_path / f"vectors{ranks}", "vectors") for ranks in (0, 2))
    assert one.counts["rows"] == 41
    assert one.fingerprint == two.fingerprint


@pytest.mark.slow
def test_refusals_are_one_line_and_code_2(alone, shards_dir, tmp_path):
    recipe = str(write_recipe(tmp_path, "pretrain", shards_dir))
    cases = {
        "fp16, which needs a GPU": ["--deepspeed_config", "ds_configs/fp16_zero1.json"],
        "is not a multiple of the micro-batch 3": ["--set", "optimization.micro_batch=3"],
        "no such shards artifact": ["--set", "data=nowhere"],
        "holds a finished model already": ["--set", f"output={alone['pretrain']}"],
    }
    for reason, arguments in cases.items():
        errors = [line for line in run(["launch/pretrain.py", recipe, *arguments], code=2).splitlines() if line]
        assert len(errors) == 1 and errors[0].startswith("error: ") and reason in errors[0], errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_checkpoint_of_another_recipe_is_refused(alone, tmp_path, shards_dir):
    folder = tmp_path / "run"
    shutil.copytree(alone["pretrain"], folder)
    shutil.rmtree(folder / "model")
    recipe = str(write_recipe(tmp_path, "pretrain", shards_dir))
    message = run(["launch/pretrain.py", recipe, "--resume", "auto", "--set", "optimization.lr=0.5"], code=2)
    assert "was made with optimization.lr = 0.001, the recipe now says 0.5" in message
    assert "holds checkpoints" in run(["launch/pretrain.py", recipe], code=2)


@pytest.mark.slow
def test_a_configuration_that_deepspeed_refuses_is_one_line(shards_dir, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "gpu"}}}))
    recipe = str(write_recipe(tmp_path, "pretrain", shards_dir))
    said = run(["launch/pretrain.py", recipe, "--deepspeed_config", str(tmp_path / "ds.json")], code=2)
    assert "error: DeepSpeed refuses the configuration: " in said and "Traceback" not in said
    assert "device" in said


@pytest.mark.slow
def test_a_run_is_not_continued_on_other_data(alone, tmp_path, shards_dir):
    for name in ("run", "shards"):
        shutil.copytree({"run": alone["pretrain"], "shards": shards_dir}[name], tmp_path / name)
    recipe = str(write_recipe(tmp_path, "pretrain", tmp_path / "shards"))
    checkpoint = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    reseal(checkpoint, lambda record: record["config"].update(data=str(tmp_path / "shards")))
    reseal(checkpoint, lambda record: record["extra"].update(inputs={str(tmp_path / "shards"): "another"}))
    shutil.rmtree(tmp_path / "run" / "model")
    said = run(["launch/pretrain.py", recipe, "--resume", "auto"], code=2)
    assert f"was made with other data than {tmp_path / 'shards'} now holds" in said
