"""Configurations of the machine: what is composed, and every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lexmae.config import OptimizationConfig
from lexmae.errors import InputError
from lexmae.train import hardware

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path):
    """Writes a configuration, given as a dictionary or as text."""
    def write(content) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path
    return write


def compose(path: Path, world: int = 1, accumulate: bool = True, **optimization) -> hardware.Hardware:
    return hardware.compose(path, OptimizationConfig(**optimization), world, accumulate=accumulate)


@pytest.mark.parametrize("world, micro, expected", [
    (1, 8, (8, 12)), (2, 8, (8, 6)), (8, None, (12, 1)), (96, 8, (1, 1)), (1, 200, (96, 1))])
def test_accumulation_follows_from_batch_ranks_and_micro_batch(config, world, micro, expected):
    found = compose(config({}), world, batch=96, micro_batch=micro)
    assert (found.micro_batch, found.accumulation) == expected
    composed = found.config
    assert composed["train_batch_size"] == 96
    assert composed["train_micro_batch_size_per_gpu"] * composed["gradient_accumulation_steps"] * world == 96


@pytest.mark.parametrize("accumulate, accumulation", [(True, 0), (False, 1)])
def test_a_budget_of_tokens_leaves_the_number_of_micro_batches_open(config, accumulate, accumulation):
    found = compose(config({}), 2, accumulate, batch=24, micro_tokens=4096)
    assert (found.micro_batch, found.micro_tokens, found.accumulation) == (0, 4096, accumulation)
    composed = found.config
    assert composed["train_micro_batch_size_per_gpu"] * composed["gradient_accumulation_steps"] * 2 == 24
    hardware.refuse_budget(found, 4096, "")
    with pytest.raises(InputError, match="micro_tokens 4096: texts are long, so at least 4097 are needed"):
        hardware.refuse_budget(found, 4097, "texts are long")
    with pytest.raises(InputError, match="the recipe sets optimization.micro_tokens"):
        compose(config({"train_micro_batch_size_per_gpu": 4}), batch=24, micro_tokens=4096)


def test_the_micro_batch_may_be_the_machines(config):
    found = compose(config({"train_micro_batch_size_per_gpu": 4}), 2, batch=16)
    assert (found.micro_batch, found.accumulation) == (4, 2)


@pytest.mark.parametrize("micro", [None, 5])
def test_fine_tuning_does_not_accumulate(config, micro):
    found = compose(config({}), 2, accumulate=False, batch=24, micro_batch=micro)
    assert (found.micro_batch, found.accumulation) == (micro or 0, 1)
    assert found.config["train_micro_batch_size_per_gpu"] == 12 and found.config["train_batch_size"] == 24


def test_what_the_file_says_stays(config):
    found = compose(config({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, "comms_logger": {"x": 1}}))
    assert (found.zero_stage, found.precision) == (2, "bf16") and found.config["comms_logger"] == {"x": 1}
    assert compose(config({"fp16": {"enabled": True}, "bf16": {"enabled": False}})).precision == "fp16"
    plain = compose(config({}))
    assert (plain.zero_stage, plain.precision) == (0, "fp32")


def test_clipping_is_the_recipes(config):
    assert compose(config({}), clip=1.0).config["gradient_clipping"] == 1.0
    assert "gradient_clipping" not in compose(config({}), clip=0.0).config


@pytest.mark.parametrize("key, owner", [
    ("train_batch_size", "optimization.batch"), ("gradient_accumulation_steps", "optimization.batch"),
    ("optimizer", "optimization.lr"), ("scheduler", "optimization.warmup"), ("gradient_clipping", "optimization.clip"),
])
def test_learning_is_refused_in_the_machines_file(config, key, owner):
    path = config({key: 1})
    with pytest.raises(InputError, match=f"sets {key}, which the recipe owns .*{owner}") as caught:
        compose(path)
    assert caught.value.path == path


def test_a_micro_batch_on_both_sides_is_refused(config):
    with pytest.raises(InputError, match="keep one of the two"):
        compose(config({"train_micro_batch_size_per_gpu": 4}), batch=16, micro_batch=4)


@pytest.mark.parametrize("value", [0, -1, "auto", 2.5, True, [4]])
def test_a_micro_batch_that_is_no_number_is_refused(config, value):
    with pytest.raises(InputError, match="train_micro_batch_size_per_gpu: a positive whole number is needed"):
        compose(config({"train_micro_batch_size_per_gpu": value}), batch=16)


@pytest.mark.parametrize("accumulate", [True, False])
def test_a_batch_that_ranks_cannot_share_is_refused(config, accumulate):
    with pytest.raises(InputError, match="optimization.batch 24 cannot be shared evenly by 5 ranks"):
        compose(config({}), 5, accumulate, batch=24)


def test_a_share_that_micro_batches_do_not_fill_is_refused(config):
    with pytest.raises(InputError, match="12 per rank, which is not a multiple of the micro-batch 5"):
        compose(config({}), 2, batch=24, micro_batch=5)


@pytest.mark.parametrize("text, line, reason", [("{\n\n oops}", 3, "not JSON"), ("", 1, "not JSON"),
                                                ("[]", None, "a JSON object is needed")])
def test_a_file_that_is_no_configuration_is_refused(config, text, line, reason):
    with pytest.raises(InputError, match=reason) as caught:
        compose(config(text))
    assert caught.value.line == line


@pytest.mark.parametrize("content", [{"zero_optimization": 3}, {"zero_optimization": {"stage": "two"}}, {"fp16": True},
                                     {"zero_optimization": {"stage": 4}}, {"bf16": {"enabled": "auto"}},
                                     {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
                                     {"gradient_allreduce_op": "sum"}, {"fp16": {"min_loss_scale": "x"}}])
def test_sections_of_the_wrong_kind_are_refused(config, content):
    with pytest.raises(InputError, match=next(iter(content))):
        compose(config(content))


def test_fp16_needs_a_gpu(config):
    path = config({"fp16": {"enabled": True}})
    with pytest.raises(InputError, match="fp16, which needs a GPU"):
        hardware.refuse_precision(compose(path), False, path)
    hardware.refuse_precision(compose(path), True, path)
    hardware.refuse_precision(compose(config({"bf16": {"enabled": True}})), False, path)


def test_a_file_is_found_from_here_or_from_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hardware.find("ds_configs/fp16_zero1.json") == ROOT / "ds_configs" / "fp16_zero1.json"
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "fp16_zero1.json").write_text("{}")
    assert hardware.find("ds_configs/fp16_zero1.json").resolve() == tmp_path / "ds_configs" / "fp16_zero1.json"
    assert hardware.find(str(tmp_path / "ds_configs" / "fp16_zero1.json")).is_absolute()
    with pytest.raises(InputError, match="absent.json: no such DeepSpeed configuration"):
        hardware.find("absent.json")


def test_the_number_of_ranks_is_the_launchers(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert hardware.world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert hardware.world_size() == 8


def test_refusing_takes_no_torch():
    program = "import sys, lexmae.train.hardware; assert not {'torch', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
