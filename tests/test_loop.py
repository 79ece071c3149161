"""The training loop with an engine of a few lines in the place of DeepSpeed."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from lexmae.config import LoggingConfig, OptimizationConfig
from lexmae.errors import Preempted, RunError
from lexmae.train import checkpoint, loop, schedules, stopping
from lexmae.train.checkpoint import Resumed
from lexmae.train.engine import StepReport
from lexmae.train.health import LexiconWatch


class PlainEngine:
    """Stochastic gradient descent on one weight; ``reports`` replaces what single steps report."""

    def __init__(self, precision: str = "fp32", reports: dict[int, StepReport] | None = None):
        self.module = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.module.weight)
        self.device = torch.device("cpu")
        self.hardware = SimpleNamespace(precision=precision, lowest_scale=1.0)
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
        norm = self.module.weight.grad.abs().item()
        report = self.reports.get(len(self.rates), StepReport(norm, 1.0, math.isfinite(norm)))
        if report.applied:
            with torch.no_grad():
                self.module.weight -= lr * self.module.weight.grad
        self.module.zero_grad()
        return report


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
def clock(monkeypatch) -> list[float]:
    """What the loop takes for the time, in seconds; a checkpoint takes 50 of them."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def saved(monkeypatch, request) -> list[int]:
    """Steps at which a checkpoint was asked for."""
    clock = request.getfixturevalue("clock") if "clock" in request.fixturenames else None
    steps: list[int] = []

    def save(engine, folder, step, config, keep, facts):
        assert facts["objective"] == {"seen": 3}
        steps.append(step)
        if clock is not None:
            clock[0] += 50.0

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
    loop.train(run, Resumed(4))
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


def test_the_time_of_probes_and_checkpoints_is_not_that_of_training(tmp_path, clock, saved):
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
    assert asked[3] == (4, []) and asked[9] == (10, [4, 6, 8])  # before the checkpoint, so that a stop loses none
    assert engine.module.weight.item() == pytest.approx(reference(10)[0], rel=1e-5)


def test_a_finished_run_does_nothing(tmp_path, saved):
    run, data = make(tmp_path, PlainEngine())
    loop.train(run, Resumed(10))
    assert data.asked == [] and saved == []


class Broken(Squares):
    """The loss is not finite at some steps."""

    def __init__(self, *steps: int):
        self.steps = steps

    def loss(self, forward, micro, totals, step, total_steps):
        loss, metrics = super().loss(forward, micro, totals, step, total_steps)
        return (loss * math.nan, {**metrics, "loss": metrics["loss"] * math.nan}) if step in self.steps else (
            loss, metrics)


def test_steps_without_a_finite_loss_are_left_out_and_counted(tmp_path, saved):
    engine = PlainEngine()
    run, _ = make(tmp_path, engine)
    run.objective = Broken(4, 5, 6, 7)
    loop.train(run)
    weight = 1.0
    for step in (0, 1, 2, 3, 8, 9):
        values = [v + step for v in (1.0, 2.0, 3.0)]
        weight -= schedules.learning_rate(step, 10, 1e-3, 0.2) * 2 * weight * sum(v * v for v in values) / 3
    assert engine.module.weight.item() == pytest.approx(weight, rel=1e-5)
    lines = log_of(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 2, 4, 4] and saved == [4, 8, 10]
    assert lines[1]["loss"] == pytest.approx(reference(4)[1][3], rel=1e-4)  # of the one step that was applied
    assert lines[1]["seconds_per_step"] > 0


def test_a_window_of_skipped_steps_alone_has_no_means(tmp_path, saved):
    run, _ = make(tmp_path, PlainEngine())
    run.objective = Broken(3, 4, 5)
    loop.train(run)
    assert "loss" not in log_of(tmp_path)[1] and log_of(tmp_path)[2]["loss"] > 0


def test_too_many_in_a_row_stop_the_run_with_the_names_of_the_examples(tmp_path, saved):
    engine = PlainEngine()
    run, _ = make(tmp_path, engine, max_skipped=3)
    run.objective = Broken(1, 4, 5, 6, 7)
    run.examples = lambda step: [f"document d{step}-{i}" for i in range(10)]
    with pytest.raises(RunError, match=r"the loss was not finite 3 steps in a row, the last of them step 7 \(document "
                                       r"d6-0, .*d6-7 and 2 more, see .*bad_batch.json\); none of these steps changed"):
        loop.train(run)
    assert json.loads((tmp_path / "bad_batch.json").read_text())["examples"][9] == "document d6-9"
    assert saved == [4] and not [t for t in threading.enumerate() if t.name == "prefetch"]


@pytest.mark.parametrize("total, limit, reason", [(4, 4, "4 steps in a row, the last of them step 4"),
                                                  (3, 9, "none of the 3 steps changed the weights")])
def test_a_run_that_ends_without_a_good_step_fails(tmp_path, saved, total, limit, reason):
    run, _ = make(tmp_path, PlainEngine(), total=total, checkpoint_every=0, max_skipped=limit)
    run.objective = Broken(*range(total))
    with pytest.raises(RunError, match=reason):
        loop.train(run)
    assert not saved


def test_figures_of_other_probes_do_not_count(tmp_path, saved):
    facts = {"best_probe": 0.8, checkpoint.PROBED: {"queries": 5}}
    for settings, expected in (({"queries": 5}, [8, 10]), ({"queries": 9}, [5, 6, 8, 10])):
        saved.clear()
        run, _ = make(tmp_path, PlainEngine())
        run.facts = {checkpoint.PROBED: settings}
        run.probe = lambda done: {"probe_mrr_10": done / 100} if done in (5, 6) else {}
        loop.train(run, Resumed(4, facts))
        assert saved == expected


def test_a_gradient_that_is_not_finite_counts_too(tmp_path, saved):
    reports = {n: StepReport(math.inf, 1.0, False) for n in range(2, 9)}
    run, _ = make(tmp_path, PlainEngine("bf16", reports), max_skipped=5)
    with pytest.raises(RunError, match="the gradient was not finite 5 steps in a row, the last of them step 6"):
        loop.train(run)


def test_what_loss_scaling_skips_does_not_stop_a_run(tmp_path, saved):
    reports = {n: StepReport(math.inf, 2.0 ** (20 - n), False) for n in range(1, 10)}
    run, _ = make(tmp_path, PlainEngine("fp16", reports), max_skipped=2)
    loop.train(run)
    assert saved == [4, 8, 10]
    assert [line["loss_scale"] for line in log_of(tmp_path)] == [2.0**17, 2.0**14, 2.0**11, 1.0]
    assert log_of(tmp_path)[-1]["skipped"] == 9


def test_a_loss_scale_at_its_minimum_is_said_and_ends_the_run(tmp_path, saved, capsys):
    reports = {n: StepReport(math.inf, 1.0, False) for n in range(2, 9)}
    run, _ = make(tmp_path, PlainEngine("fp16", reports), max_skipped=4)
    with pytest.raises(RunError, match="4 steps in a row with the loss scale of fp16 at its minimum, 1, the last"):
        loop.train(run)
    assert capsys.readouterr().err.count("the loss scale of fp16 has fallen to its minimum, 1, at step 2") == 1


def test_skips_go_on_counting_in_a_continued_run(tmp_path, saved):
    run, _ = make(tmp_path, PlainEngine(reports={1: StepReport(math.inf, 1.0, False)}))
    loop.train(run, Resumed(4, {"skipped": 5}))
    assert log_of(tmp_path)[-1]["skipped"] == 6


# ---------------------------------------------------------------------------------------------------------- signals


def signalled(run: loop.Run, moments: dict[int, int]) -> None:
    """Send this process signals as the data of some steps are asked for on the way."""
    inner = run.objective.loss

    def loss(forward, micro, totals, step, total_steps):
        if step in moments:
            os.kill(os.getpid(), moments.pop(step))
            time.sleep(0.05)  # another thread takes it
        return inner(forward, micro, totals, step, total_steps)

    run.objective.loss = loss


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_stop_finishes_the_step_saves_and_ends(tmp_path, saved, number, capsys):
    before = signal.getsignal(number)
    engine = PlainEngine()
    run, _ = make(tmp_path, engine)
    signalled(run, {4: number})
    with pytest.raises(Preempted, match=r"stopped after step 5, saved as .*step-5; --resume auto continues") as stop:
        loop.train(run)
    assert stop.value.code == 75 and saved == [4, 5]
    assert engine.module.weight.item() == pytest.approx(reference(5)[0], rel=1e-5)
    assert [line["step"] for line in log_of(tmp_path)] == [3, 5]
    assert f"{signal.Signals(number).name}: finishing the step, then saving" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_a_request_to_save_is_met_once_and_the_run_goes_on(tmp_path, saved):
    run, _ = make(tmp_path, PlainEngine())
    signalled(run, {1: signal.SIGUSR1, 3: signal.SIGUSR1, 8: signal.SIGUSR1})
    loop.train(run)
    assert saved == [2, 4, 8, 9, 10]  # that of step 4 was due anyway


def test_a_signal_before_anything_is_done_saves_nothing(tmp_path, saved):
    run, data = make(tmp_path, PlainEngine())
    inner = data.__call__

    def first(step: int):
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return inner(step)

    run.data = first
    with pytest.raises(Preempted, match="stopped after step 0, nothing to save"):
        loop.train(run)
    assert saved == []


def test_a_second_interrupt_ends_at_once(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(stopping.os, "_exit", codes.append)
    signals = loop.Signals()
    signals._take(signal.SIGTERM)
    signals._take(signal.SIGINT)
    signals._take(signal.SIGTERM)
    assert codes == [] and signals.asked() == (True, False)
    signals._take(signal.SIGINT)
    assert codes == [130]


# -------------------------------------------------------------------------------------------- probes and the lexicon


def test_the_step_of_the_best_probe_is_saved(tmp_path, saved):
    def probe(done: int) -> dict[str, float]:
        return {"probe_mrr_10": {3: 0.2, 6: 0.3, 9: 0.3}[done]} if done % 3 == 0 else {}

    run, _ = make(tmp_path, PlainEngine())
    run.probe = probe
    loop.train(run)
    assert saved == [3, 4, 6, 8, 10]
    saved.clear()
    loop.train(run, Resumed(4, {"best_probe": 0.2}))
    assert saved == [6, 8, 10]
    saved.clear()
    loop.train(run, Resumed(4, {"best_probe": 0.4}))
    assert saved == [8, 10]
    saved.clear()
    run, _ = make(tmp_path, PlainEngine(), checkpoint_every=0)
    run.probe = probe
    loop.train(run)
    assert saved == [10]


class Lexicon(Squares):
    """Active terms of documents and queries at each step."""

    def __init__(self, docs, queries=lambda step: 5.0):
        self.terms = {"terms_docs": docs, "terms_queries": queries}

    def loss(self, forward, micro, totals, step, total_steps):
        loss, metrics = super().loss(forward, micro, totals, step, total_steps)
        return loss, {**metrics, **{name: torch.tensor(terms(step) / 2) for name, terms in self.terms.items()}}


@pytest.mark.parametrize("docs, queries, moments", [
    (lambda step: 0.0 if step >= 60 else 9.0, lambda step: 5.0, [(150, "every document vector of the last 50 steps")]),
    (lambda step: 9.0, lambda step: 0.0, [(50, "every query vector of the last 50 steps is empty")]),
    (lambda step: 70.0, lambda step: 5.0, [(150, "70 of 100 terms are active in a document vector. Raise loss.lamb")]),
    (lambda step: 0.0 if step % 50 else 3.0, lambda step: 49.0, []),
    (lambda step: 80.0 if step < 90 else 10.0, lambda step: 5.0, []),
])
def test_a_collapsed_lexicon_is_named_once(tmp_path, saved, capsys, docs, queries, moments):
    run, data = make(tmp_path, PlainEngine(), total=300, every=100, checkpoint_every=0)
    run.data = lambda step: data(step % 3)
    run.objective, run.lexicon = Lexicon(docs, queries), LexiconWatch(100, settled=80)
    loop.train(run)
    warned = [(line["step"], line["warning"]) for line in log_of(tmp_path) if "warning" in line]
    assert [step for step, _ in warned] == [step for step, _ in moments]
    assert all(text in found for (_, found), (_, text) in zip(warned, moments, strict=True))
    assert capsys.readouterr().err.count("warning: ") == len(moments)
    said = LexiconWatch(100, settled=80, said=run.lexicon.said)  # as a continued run begins
    run.lexicon = said
    loop.train(run)
    assert not [line for line in log_of(tmp_path) if "warning" in line]


def test_an_error_in_the_data_stops_the_run(tmp_path, saved):
    run, _ = make(tmp_path, PlainEngine())

    def broken(step: int):
        raise OSError("the disk is gone")

    run.data = broken
    with pytest.raises(OSError, match="the disk is gone"):
        loop.train(run)
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
