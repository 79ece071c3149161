"""Every shipped recipe with every shipped hardware configuration; recipes/README.md against the code."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest
import yaml

from lexmae import config as c
from lexmae import recipe
from lexmae.cycle import config as p
from lexmae.cycle.plan import Plan
from lexmae.train import hardware

ROOT = Path(__file__).parents[1]
HARDWARE = sorted((ROOT / "ds_configs").glob("*.json"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
WORLDS = (1, 2, 8)


def kind(path: Path) -> type:
    """The dataclass of a recipe file, told by its keys."""
    keys = yaml.safe_load(path.read_text(encoding="utf-8")).keys()
    if "work" in keys:
        return p.PipelineRecipe
    if "max_length" in keys:
        return c.RerankRecipe
    return c.FinetuneRecipe if {"negatives", "loss"} & keys else c.PretrainRecipe


TRAINING = [path for path in RECIPES if kind(path) is not p.PipelineRecipe]
PIPELINES = [path for path in RECIPES if kind(path) is p.PipelineRecipe]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_recipes_and_configurations():
    assert len(TRAINING) >= 3 and len(PIPELINES) >= 1 and len(HARDWARE) >= 12


@pytest.mark.parametrize("path", TRAINING, ids=label)
def test_every_recipe_runs_on_every_machine(path):
    config = recipe.load(path, kind(path))
    accumulate = hardware.accumulates(config)
    assert accumulate == (kind(path) is not c.FinetuneRecipe)
    for world in WORLDS:
        for file in HARDWARE:
            found = hardware.compose(file, config.optimization, world, accumulate=accumulate)
            composed = found.config
            batch = composed["train_micro_batch_size_per_gpu"] * composed["gradient_accumulation_steps"] * world
            assert batch == composed["train_batch_size"] == config.optimization.batch
            assert composed.get("gradient_clipping", 0) == config.optimization.clip


@pytest.mark.parametrize("path", TRAINING, ids=label)
def test_the_recipes_own_configuration_exists(path):
    assert hardware.find(recipe.load(path, kind(path)).deepspeed) in HARDWARE or \
        (ROOT / recipe.load(path, kind(path)).deepspeed).is_file()


@pytest.mark.parametrize("file", HARDWARE, ids=label)
def test_names_of_configurations_are_true(file):
    found = hardware.compose(file, c.OptimizationConfig(), 1, accumulate=True)
    precision, zero, *offload = file.stem.split("_")
    assert found.precision == precision and f"zero{found.zero_stage}" == zero
    section = found.config["zero_optimization"]
    devices = {key: section.get(key, {}).get("device") for key in ("offload_optimizer", "offload_param")}
    assert (devices["offload_optimizer"] == "cpu") == (offload == ["offload"])
    assert devices["offload_param"] in (None, "cpu")
    assert file.read_text(encoding="utf-8").endswith("}\n")


def stand_in(config: p.PipelineRecipe) -> None:
    """Folders and files that a user brings."""
    for folder in (config.input, *(other.input for other in config.evaluation.zero_shot)):
        if folder != "builtin":
            Path(folder).mkdir(parents=True, exist_ok=True)
    for stage in config.stages:
        if "/" in stage.negatives:
            Path(stage.negatives).parent.mkdir(parents=True, exist_ok=True)
            Path(stage.negatives).touch()


@pytest.mark.parametrize("path", PIPELINES, ids=label)
def test_every_pipeline_has_a_plan(path, tmp_path, monkeypatch):
    """Also where the data are not."""
    monkeypatch.chdir(tmp_path)
    config = recipe.load(path, p.PipelineRecipe)
    stand_in(config)
    for world in WORLDS:
        for file in HARDWARE:
            steps = Plan(config, path.parent, str(file), world).steps
            names = [step.name for step in steps]
            assert names.index("prepare") < names.index("bm25")
            assert all(f"{stage.name}-evaluate" in names for stage in config.stages)
            for step in steps:
                if step.command[0].endswith(".py"):
                    assert (ROOT / step.command[0]).is_file()


@pytest.mark.parametrize("path", PIPELINES, ids=label)
def test_a_recipe_alone_and_in_its_pipeline_agree(path, tmp_path, monkeypatch):
    """What a pipeline sets is what the recipes say for themselves, so that both ways train the same."""
    monkeypatch.chdir(tmp_path)
    config = recipe.load(path, p.PipelineRecipe)
    stand_in(config)
    for step in Plan(config, path.parent).steps:
        if step.command[0].startswith("launch/"):
            file = Path(step.command[1])
            start = step.command.index("--set") + 1
            overrides = step.command[start:step.command.index("--resume")]
            assert recipe.load(file, kind(file), overrides) == recipe.load(file, kind(file)), label(file)


@pytest.mark.parametrize("path", RECIPES, ids=label)
def test_every_yaml_file_is_a_recipe(path):
    text = path.read_text(encoding="utf-8")
    recipe.load(path, kind(path))
    assert text.startswith("#"), "a recipe begins by saying what it is for"


def test_the_papers_recipes_are_the_papers():
    pretrain = recipe.load(ROOT / "recipes/msmarco/pretrain.yaml", c.PretrainRecipe)
    assert pretrain.optimization.lr == 3e-4 and pretrain.optimization.batch == 2048
    assert dataclasses.replace(pretrain.optimization, micro_batch=None) == c.OptimizationConfig()
    assert (pretrain.masking, pretrain.bottleneck) == (c.MaskingConfig(), c.BottleneckConfig())
    for name, depth, lambda_docs in (("stage1", 1000, 0.002), ("stage2", 200, 0.008)):
        found = recipe.load(ROOT / f"recipes/msmarco/{name}.yaml", c.FinetuneRecipe)
        assert found.optimization == c.FinetuneRecipe("d", "o").optimization
        assert (found.negatives.per_query, found.negatives.depth) == (15, depth)
        assert (found.loss.lambda_docs, found.loss.query_weight) == (lambda_docs, pytest.approx(0.75 * lambda_docs))
    third = recipe.load(ROOT / "recipes/msmarco/stage3.yaml", c.FinetuneRecipe)
    expected = c.FinetuneRecipe("d", "o").optimization
    assert dataclasses.replace(third.optimization, micro_batch=None) == dataclasses.replace(expected, batch=16)
    assert (third.negatives.per_query, third.negatives.depth) == (23, 1000)
    assert third.negatives.path == "runs/msmarco/reranker/stage2.jsonl"
    assert third.loss == c.LossConfig(lambda_docs=0.008, contrastive_weight=0.2, distillation="kl")
    rerank = recipe.load(ROOT / "recipes/msmarco/rerank.yaml", c.RerankRecipe)
    own = c.RerankRecipe("d", "o")
    assert (rerank.max_length, rerank.negatives.per_query, rerank.negatives.depth) == (
        own.max_length, own.negatives.per_query, own.negatives.depth)
    assert dataclasses.replace(rerank.optimization, micro_batch=None) == own.optimization
    stages = recipe.load(ROOT / "recipes/msmarco/pipeline.yaml", p.PipelineRecipe).stages
    assert [stage.init for stage in stages] == ["pretrain"] * len(stages)


# ------------------------------------------------------------------------------------------- recipes/README.md


def documented() -> dict[str, str]:
    """Key → default of the tables of recipes/README.md; `a.b`, `c` in one cell are two keys of one section."""
    found = {}
    for line in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3 or not cells[0].startswith("`"):
            continue
        names = re.findall(r"`([\w.*]+)`", cells[0])
        section = names[0].rpartition(".")[0]
        for name in names:
            found[name if "." in name or not section else f"{section}.{name}"] = cells[2]
    return found


def fields(kind: type, prefix: str = "") -> dict[str, tuple]:
    """Key → its default, if it has one; of sections, of what is in them; items of a list are `.*`."""
    found: dict[str, tuple] = {}
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        inner = next((t for t in typing.get_args(hints[item.name]) if dataclasses.is_dataclass(t)), None)
        if dataclasses.is_dataclass(hints[item.name]):
            found |= fields(hints[item.name], f"{prefix}{item.name}.")
            continue
        if inner:
            listed = typing.get_origin(hints[item.name]) is tuple
            found |= fields(inner, f"{prefix}{item.name}.{'*.' if listed else ''}")
        found[prefix + item.name] = () if item.default is dataclasses.MISSING else (item.default,)
    return found


def all_fields() -> dict[str, tuple]:
    """The keys of every kind of recipe; a default that two kinds have is fine-tuning's."""
    kinds = (c.RerankRecipe, c.PretrainRecipe, c.FinetuneRecipe, p.PipelineRecipe)
    return {key: default for kind in kinds for key, default in fields(kind).items()}


def test_every_key_is_documented_and_no_other():
    known = all_fields()
    written = {key for key in documented() if not key.endswith(".*") and not key.endswith(".yaml")}
    assert written == set(known)


def test_documented_defaults_are_true():
    table = documented()
    known = all_fields()
    compared = 0
    for key, default in known.items():
        cell = re.findall(r"`([^`]*)`", table[key])
        if default and cell and not key.startswith(("optimization.beta", "optimization.epsilon")):
            value = yaml.safe_load(cell[0])
            value = float(value) if isinstance(default[0], float) else value
            assert value == default[0] or not value and not default[0], key
            compared += 1
    assert compared > 30
    own = c.FinetuneRecipe("d", "o").optimization
    for name in ("lr", "batch", "epochs", "clip"):
        first, second = re.findall(r"`([^`]*)`", table[f"optimization.{name}"])
        assert float(first) == getattr(c.OptimizationConfig(), name) and float(second) == getattr(own, name)


def test_the_rerankers_own_defaults_are_true():
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    written = dict(re.findall(r"`(\w+\.\w+)` is `([^`]+)`", text.partition("## Reranking")[2].partition("\n## ")[0]))
    own = c.RerankRecipe("d", "o")
    differing = {}
    for section in ("negatives", "optimization", "logging"):
        mine, usual = getattr(own, section), getattr(c.FinetuneRecipe("d", "o"), section)
        differing |= {f"{section}.{item.name}": getattr(mine, item.name) for item in dataclasses.fields(mine)
                      if getattr(mine, item.name) != getattr(usual, item.name)}
    assert {key: float(value) for key, value in written.items()} == differing


def test_configurations_of_deepspeed_are_plain_json():
    for file in HARDWARE:
        assert isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
