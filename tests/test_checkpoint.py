"""Finding checkpoints, and refusing those of another run; saving and loading them is tested with real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lexmae import artifact
from lexmae.errors import InputError
from lexmae.train import checkpoint

CONFIG = {"optimization": {"lr": 1e-3, "batch": 8}, "data": "shards", "stages": (1, 2)}


def make(folder: Path, *steps: int) -> Path:
    for step in steps:
        with artifact.create(folder / f"step-{step}", "checkpoint", config=CONFIG) as draft:
            draft.counts["step"] = step
            draft.extra.update(world=2, zero_stage=1, precision="fp32")
    return folder


def test_steps_are_in_order_of_number_and_finished(tmp_path):
    make(tmp_path, 10, 9, 100)
    (tmp_path / "step-200").mkdir()
    (tmp_path / "step-300.partial").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoint.steps(tmp_path) == [9, 10, 100]
    assert checkpoint.steps(tmp_path / "absent") == []


def test_choosing(tmp_path):
    make(tmp_path, 10, 9, 100)
    assert checkpoint.choose(tmp_path, "auto") == tmp_path / "step-100"
    assert checkpoint.choose(tmp_path, "9") == tmp_path / "step-9"
    assert checkpoint.choose(tmp_path / "elsewhere", str(tmp_path / "step-10")) == tmp_path / "step-10"
    assert checkpoint.choose(tmp_path / "elsewhere", "auto") is None
    with pytest.raises(InputError, match="step-11: no such checkpoint"):
        checkpoint.choose(tmp_path, "11")


def test_the_same_recipe_is_accepted_also_as_json_gives_it_back(tmp_path):
    assert checkpoint.refuse_mismatch(make(tmp_path, 3) / "step-3", CONFIG, 2, 1) is None
    assert checkpoint.refuse_mismatch(tmp_path / "step-3", {**CONFIG, "stages": [1, 2]}, 2, 1) is None


@pytest.mark.parametrize("config, world, stage, reason", [
    ({**CONFIG, "optimization": {"lr": 2e-3, "batch": 8}}, 2, 1,
     "was made with optimization.lr = 0.001, the recipe now says 0.002"),
    ({**CONFIG, "new": 1}, 2, 1, "was made with new = None, the recipe now says 1"),
    ({**CONFIG, "stages": (1,)}, 2, 1, "was made with stages"),
    (CONFIG, 4, 1, "was made with 2 ranks, now there is 4"),
    (CONFIG, 2, 3, "was made with 1 as ZeRO stage, now there is 3"),
])
def test_another_run_is_refused(tmp_path, config, world, stage, reason):
    with pytest.raises(InputError, match=reason):
        checkpoint.refuse_mismatch(make(tmp_path, 3) / "step-3", config, world, stage)
