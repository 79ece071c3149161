"""The training loop with an engine of a few lines in the place of DeepSpeed."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from lexmae.config import LoggingConfig, OptimizationConfig
from lexmae.train import loop, schedules
from lexmae.train.engine import StepReport


class PlainEngine:
    """Stochastic gradient descent on one weight; ``reports`` replaces what single steps report."""

    def __init__(self, precision: str = "fp32", reports: dict[int, StepReport] | None = None):
        self.module = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.module.weight)
        self.device, self.hardware = torch.device("cpu"), SimpleNamespace(precision=precision)
        self.rates, self.reports, self.closed = [], reports or {}, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def expect(self, micro_batches: int) -> None:
        assert micro_batches == 2

    def end_micro_batch(self) -> None:
        self.closed += 1

    def step(self, lr: float) -> StepReport:
        self.rates.append(lr)
        with torch.no_grad():
            self.module.weight -= lr * self.module.weight.grad
        norm = self.module.weight.grad.abs().item()
        self.module.zero_grad()
        return self.reports.get(len(self.rates), StepReport(norm, 1.0, True))


class Squares:
    """Mean square over the examples of the step, which come in micro-batches."""

    def micro_batches(self, step_data):
        return step_data

    def counts(self, step_data):
        return [sum(len(part) for part in step_data)]

    def loss(self, forward, micro, totals, step, total_steps):
        loss = (forward(micro) ** 2).sum() / totals[0]
        return loss, {"loss": loss.detach(), "examples_seen": torch.tensor(float(len(micro)))}

    def sizes(self, micro):
        return len(micro), 2 * len(micro)

    def state_dict(self):
        return {"seen": 3}


@dataclass
class Recorder:
    """Data of the run, and what was asked of it."""

    asked: list[int] = field(default_factory=list)

    def __call__(self, step: int) -> list[torch.Tensor]:
        self.asked.append(step)
        values = torch.arange(1.0, 4.0).unsqueeze(1) + step
        return [values[:2], values[2:]]


@pytest.fixture
def saved(monkeypatch) -> list[int]:
    """Steps at which a checkpoint was asked for."""
    steps: list[int] = []

    def save(engine, folder, step, config, keep, objective):
        assert objective == {"seen": 3}
        steps.append(step)

    monkeypatch.setattr(loop.checkpoint, "save", save)
    return steps


def make(tmp_path, engine, total: int = 10, **logging) -> tuple[loop.Run, Recorder]:
    data = Recorder()
    options = {"every": 3, "checkpoint_every": 4, "keep": 2} | logging
    return loop.Run(engine, Squares(), data, OptimizationConfig(lr=1e-3, batch=3, warmup=0.2),
                    LoggingConfig(**options), total, tmp_path, {}), data


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def reference(stop: int, total: int = 10) -> tuple[float, dict[int, float]]:
    """Weight after ``stop`` of ``total`` steps, and the loss of every step, worked out by hand."""
    weight, losses = 1.0, {}
    for step in range(stop):
        values = [v + step for v in (1.0, 2.0, 3.0)]
        losses[step] = sum((weight * v) ** 2 for v in values) / 3
        gradient = 2 * weight * sum(v * v for v in values) / 3
        weight -= schedules.learning_rate(step, total, 1e-3, 0.2) * gradient
    return weight, losses


def test_training_is_what_it_is_by_hand(tmp_path, saved):
    engine = PlainEngine()
    run, data = make(tmp_path, engine)
    loop.train(run)
    weight, losses = reference(10)
    assert engine.module.weight.item() == pytest.approx(weight, rel=1e-5)
    assert data.asked == list(range(10)) and saved == [4, 8, 10]
    assert engine.closed == 10  # the first of two micro-batches of every step
    found = log_of(tmp_path)
    assert [line["step"] for line in found] == [3, 6, 9, 10]
    for line, window in zip(found, ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9]), strict=True):
        assert line["loss"] == pytest.approx(sum(losses[s] for s in window) / len(window), rel=1e-4)
        assert line["lr"] == schedules.learning_rate(window[-1], 10, 1e-3, 0.2)
        assert line["examples_seen"] == 3 and line["padding"] == 0.5 and line["examples"] == 3 * line["step"]
        assert line["tokens_per_second"] > 0 and 0 <= line["data_wait"] <= 1 and line["grad_norm"] > 0


def test_a_continued_run_does_the_rest_and_no_more(tmp_path, saved):
    whole = PlainEngine()
    run, _ = make(tmp_path, whole)
    loop.train(run)
    saved.clear()
    engine = PlainEngine()
    torch.nn.init.constant_(engine.module.weight, reference(4)[0])
    run, data = make(tmp_path, engine)
    loop.train(run, start=4)
    assert engine.module.weight.item() == pytest.approx(whole.module.weight.item(), rel=1e-5)
    assert data.asked == [4, 5, 6, 7, 8, 9] and saved == [8, 10]
    assert [line["step"] for line in log_of(tmp_path)] == [3, 6, 9, 10]


def test_no_checkpoint_but_the_last(tmp_path, saved):
    run, _ = make(tmp_path, PlainEngine(), total=9, checkpoint_every=0)
    loop.train(run)
    assert saved == [9]


def test_the_end_is_saved_once(tmp_path, saved):
    run, _ = make(tmp_path, PlainEngine(), total=8)
    loop.train(run)
    assert saved == [4, 8] and [line["step"] for line in log_of(tmp_path)] == [3, 6, 8]


def test_probes_are_reported_and_their_time_is_not_that_of_training(tmp_path, saved, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    engine, asked = PlainEngine(), []
    run, _ = make(tmp_path, engine)

    def step(lr: float, inner=engine.step) -> StepReport:
        clock[0] += 1.0
        return inner(lr)

    def probe(done: int) -> dict[str, float]:
        asked.append((done, list(saved)))
        clock[0] += 100.0 * (done in (4, 6, 10))
        return {"probe_mrr_10": done / 10} if done in (4, 6, 10) else {}

    engine.step, run.probe = step, probe
    loop.train(run)
    found = log_of(tmp_path)
    assert [(line["step"], line.get("probe_mrr_10")) for line in found] == [
        (3, None), (4, 0.4), (6, None), (6, 0.6), (9, None), (10, None), (10, 1.0)]
    assert [line["seconds_per_step"] for line in found if "loss" in line] == [1.0] * 4
    assert [done for done, _ in asked] == list(range(1, 11))
    assert asked[3] == (4, []) and asked[9] == (10, [4, 8])  # before the checkpoint, so that a stop loses none
    assert engine.module.weight.item() == pytest.approx(reference(10)[0], rel=1e-5)


def test_a_finished_run_does_nothing(tmp_path, saved):
    run, data = make(tmp_path, PlainEngine())
    loop.train(run, start=10)
    assert data.asked == [] and saved == []


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, saved):
    run, _ = make(tmp_path, PlainEngine(reports={6: StepReport(math.nan, 1.0, True)}))
    with pytest.raises(loop.Diverged, match="gradient is not finite at step 6"):
        loop.train(run)
    assert saved == [4] and not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_a_step_that_loss_scaling_skips_does_not(tmp_path, saved):
    run, _ = make(tmp_path, PlainEngine("fp16", {6: StepReport(math.inf, 32768.0, False)}))
    loop.train(run)
    assert saved == [4, 8, 10]
    assert [line["loss_scale"] for line in log_of(tmp_path)] == [1.0, 32768.0, 1.0, 1.0]


@pytest.mark.parametrize("precision, stops", [("fp32", True), ("bf16", True), ("fp16", False)])
def test_a_loss_that_is_not_finite(tmp_path, saved, precision, stops):
    engine = PlainEngine(precision, {n: StepReport(None, 1.0, True) for n in range(1, 11)})
    torch.nn.init.constant_(engine.module.weight, math.nan)
    run, _ = make(tmp_path, engine)
    if stops:
        with pytest.raises(loop.Diverged, match="loss is not finite at step 3"):
            loop.train(run)
        assert saved == []
    else:
        loop.train(run)
        assert log_of(tmp_path)[0]["loss"] is None


def test_an_error_in_the_data_stops_the_run(tmp_path, saved):
    run, _ = make(tmp_path, PlainEngine())

    def broken(step: int):
        raise OSError("the disk is gone")

    run.data = broken
    with pytest.raises(OSError, match="the disk is gone"):
        loop.train(run)
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
