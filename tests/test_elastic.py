"""Checkpoints continue at another ZeRO stage, in another precision and on another number of ranks; real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment, free_port

pytestmark = pytest.mark.slow
CONFIGURATIONS = [{"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 0, "precision": "bf16"},
                  {"stage": 1, "precision": "bf16"}, {"stage": 1, "precision": "bf16", "accumulation": "fp32"},
                  {"stage": 3, "precision": "bf16"}, {"stage": 2, "offload": True}, {"stage": 3, "offload": True},
                  {"stage": 0, "precision": "fp16"}, {"stage": 2, "precision": "fp16"},
                  {"stage": 3, "precision": "fp16"}]


def ranks(folder: Path, world: int, jobs: list[dict]) -> dict[str, dict]:
    """Run jobs on so many ranks; what each has written, by name."""
    port = str(free_port())
    started = []
    for rank in range(world):
        settings = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "elastic.py"), str(folder), json.dumps(jobs)], cwd=ROOT,
            env={**environment(), **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    texts = [process.communicate(timeout=400)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(text[-3000:] for text in texts)
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["name"]: line for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def alone(work) -> dict[str, dict]:
    """One rank at stage 0: without a break, the beginning of that, and with the third step left out."""
    return ranks(work, 1, [{"name": "whole", "steps": 12, "stage": 0}, {"name": "begun", "steps": 4, "stage": 0},
                           {"name": "skip", "steps": 4, "stage": 0, "poison": 2}])


def test_the_same_curve_across_stages_and_numbers_of_ranks(work, alone):
    def chain(world: int, *stages: int) -> None:
        nonlocal last, found
        jobs = []
        for stage in stages:
            done = 0 if last is None else int(last.rsplit("-", 1)[1])
            name = f"chain{done}-{world}x{stage}"
            jobs.append({"name": name, "steps": 1, "stage": stage, "resume": last})
            last = f"{name}/step-{done + 1}"
        found = ranks(work, world, jobs)

    last, found = None, {}
    chain(2, 1, 2, 3, 1)
    chain(1, 0, 1, 2, 3)
    chain(2, 0, 3, 0, 2)
    parts = [line for name, line in found.items() if name.startswith("chain")]
    assert [line["start"] for line in parts] == list(range(12))
    assert [line["losses"][0] for line in parts] == pytest.approx(alone["whole"]["losses"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_where_nothing_changes_nothing_is_lost(work, world):
    """Also with dropout and in every precision: a run that was saved and loaded equals one that was not, bit by bit."""
    jobs = []
    for i, configuration in enumerate(CONFIGURATIONS):
        name, common = f"exact{world}-{i}", {**configuration, "dropout": 0.2}
        jobs += [{"name": f"{name}-whole", "steps": 4, **common}, {"name": f"{name}-first", "steps": 2, **common},
                 {"name": f"{name}-second", "steps": 2, "resume": f"{name}-first/step-2", **common}]
    found = ranks(work, world, jobs)
    for i in range(len(CONFIGURATIONS)):
        whole, first, second = (found[f"exact{world}-{i}-{part}"] for part in ("whole", "first", "second"))
        assert first["losses"] + second["losses"] == whole["losses"], CONFIGURATIONS[i]
        assert all(second[key] == whole[key] for key in ("weight", "exp_avg_sq")), CONFIGURATIONS[i]


def test_precision_may_change(work, alone):
    found = ranks(work, 2, [{"name": "to-bf16", "steps": 2, "stage": 1, "precision": "bf16", "resume": "begun/step-4"},
                            {"name": "and-back", "steps": 2, "stage": 3, "resume": "to-bf16/step-6"}])
    assert found["to-bf16"]["start"] == 4 and found["and-back"]["start"] == 6
    assert found["and-back"]["losses"] == pytest.approx(alone["whole"]["losses"][6:8], rel=0.1)


@pytest.mark.parametrize("world", [1, 2])
def test_lower_precisions_have_about_the_losses_and_gradients_of_float32(work, alone, world):
    """Whatever the loss was scaled by; and what is exported are the optimizer's float32 weights."""
    half = [configuration for configuration in CONFIGURATIONS if "precision" in configuration]
    found = ranks(work, world, [{"name": f"low{world}-{i}", "steps": 4, **configuration}
                                for i, configuration in enumerate(half)])
    for i, configuration in enumerate(half):
        line = found[f"low{world}-{i}"]
        assert all(line["applied"]) and not line["exported_low"], configuration
        assert line["moment"] == pytest.approx(alone["begun"]["moment"], rel=0.05), configuration
        for key in ("losses", "norms"):
            assert line[key][1:] == pytest.approx(alone["begun"][key][1:], rel=0.02), (configuration, key)


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_any(work, alone, world):
    jobs = [{"name": f"skip{world}-{i}", "steps": 4, "poison": 2, **configuration}
            for i, configuration in enumerate(CONFIGURATIONS)]
    found = ranks(work, world, jobs)
    for i, configuration in enumerate(CONFIGURATIONS):
        line = found[f"skip{world}-{i}"]
        assert line["applied"] == [True, True, False, True], configuration
        if configuration.get("precision") is None:
            expected = alone["skip"]["losses"]
            assert [line["losses"][k] for k in (0, 1, 3)] == pytest.approx([expected[k] for k in (0, 1, 3)], rel=1e-4)
