"""One training loop for every objective."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lexmae import lifeline
from lexmae.cli import progress, say
from lexmae.config import LoggingConfig, OptimizationConfig
from lexmae.data.batches import prefetch
from lexmae.errors import Preempted
from lexmae.train import checkpoint, schedules
from lexmae.train.checkpoint import Resumed
from lexmae.train.engine import Engine, StepReport
from lexmae.train.flops import Meter
from lexmae.train.health import LexiconWatch, Skips
from lexmae.train.metrics_log import MetricsLog
from lexmae.train.objectives import Metrics, Objective
from lexmae.train.stopping import Signals


@dataclass
class Run:
    """One run: what is trained, on what, how long, and where it reports.

    Attributes:
        data: optimizer step → this rank's part of its batch.
        config: the composed recipe, kept in checkpoints.
        facts: what else checkpoints keep: ``checkpoint.INPUTS`` and ``checkpoint.PROBED``.
        folder: the run's folder.
        probe: optimizer steps done → figures of a probe, none where none is due.
        examples: optimizer step → ids of its examples, for messages.
        lexicon: looks at the active terms, where vectors should be sparse.
        meter: counts arithmetic.
    """

    engine: Engine
    objective: Objective
    data: Callable[[int], Any]
    optimization: OptimizationConfig
    logging: LoggingConfig
    total: int
    folder: Path
    config: dict[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    probe: Callable[[int], dict[str, float]] = lambda step: {}
    examples: Callable[[int], list[str]] = lambda step: []
    lexicon: LexiconWatch | None = None
    meter: Meter = field(default_factory=Meter)


class _Window:
    """Sums of what happened since the last report; metrics are those of the steps that were applied."""

    def __init__(self) -> None:
        self.metrics: Metrics = {}
        self.steps = self.applied = self.tokens = self.padded = 0
        self.waited, self.start = 0.0, time.perf_counter()

    def add(self, metrics: Metrics, applied: bool) -> None:
        self.steps, self.applied = self.steps + 1, self.applied + applied
        if applied:
            _sum_into(self.metrics, metrics)

    def report(self, engine: Engine, last: StepReport) -> dict[str, Any]:
        """Means over the window; a collective call."""
        names = list(self.metrics)
        own = [*(self.metrics[name].float() for name in names), float(self.tokens), float(self.padded)]
        sums = engine.sum(torch.stack([torch.as_tensor(v, dtype=torch.float32, device=engine.device) for v in own]))
        *means, tokens, padded = sums.tolist()
        seconds = time.perf_counter() - self.start
        return {**{name: value / self.applied for name, value in zip(names, means, strict=True)},
                "grad_norm": last.grad_norm, "loss_scale": last.loss_scale, "tokens_per_second": tokens / seconds,
                "padding": 1 - tokens / max(1.0, padded), "data_wait": self.waited / seconds,
                "seconds_per_step": seconds / self.steps}


def _sum_into(sums: Metrics, metrics: Metrics) -> None:
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0) + value


def train(run: Run, resumed: Resumed | None = None) -> None:
    """Train from where ``resumed`` stands to the end, with reports and checkpoints on the way.

    Raises:
        RunError: too many steps in a row without a finite loss and gradient, or a checkpoint that cannot be written.
        Preempted: a signal asked to stop, and what was done is saved.
    """
    run.engine.module.train()
    with Signals() as signals:
        _Training(run, resumed or Resumed(), signals).go()


class _Training:
    """The state of a loop between its steps."""

    def __init__(self, run: Run, resumed: Resumed, signals: Signals):
        self.run, self.signals, self.start = run, signals, resumed.step
        self.saved = resumed.step  # the newest checkpoint, or nothing to save
        comparable = resumed.facts.get(checkpoint.PROBED) == run.facts.get(checkpoint.PROBED)
        self.best = float(resumed.facts.get("best_probe", -1.0)) if comparable else -1.0
        hardware = run.engine.hardware
        self.skips = Skips(run.logging.max_skipped, hardware.precision, hardware.lowest_scale, run.examples,
                           run.folder, int(resumed.facts.get("skipped", 0)))
        self.last: StepReport | None = None
        self.bad_loss = torch.zeros((), device=run.engine.device)  # of the last step, on this rank
        self.window, self.shown, self.figures = _Window(), {}, {}

    def go(self) -> None:
        """All steps that are left."""
        run = self.run
        self.log = MetricsLog(run.folder, self.start)
        self.bar = progress(total=run.total, desc=run.folder.name, unit="step", initial=self.start)
        batches = prefetch(run.data, self.start, run.total, device=run.engine.device)
        try:
            for step in range(self.start, run.total):
                lifeline.at(f"step {step + 1}, waiting for data")
                waiting = time.perf_counter()
                step_data = next(batches)
                self.window.waited += time.perf_counter() - waiting
                totals = self._meet(step_data, step)
                lr = schedules.learning_rate(step, run.total, run.optimization.lr, run.optimization.warmup)
                metrics = self._compute(step_data, totals, step, lr)
                if step + 1 == run.total:  # which no next step judges
                    self.skips.judge(run.total, self.last, run.engine.sum(self.bad_loss[None]).item() > 0)
                    self.skips.refuse_nothing(run.total)
                self._after(step + 1, metrics, lr)
        finally:
            batches.close()
            self.bar.close()
            self.log.close()

    def _meet(self, step_data: Any, done: int) -> list[float]:
        """What the ranks have to know of each other before the next step, in one exchange: the objective's totals,
        signals, and whether the last loss was finite everywhere."""
        engine = self.run.engine
        lifeline.at(f"step {done + 1}, exchange before it")
        own = [*self.run.objective.counts(step_data), *self.signals.asked()]
        values = torch.tensor([float(value) for value in own], device=engine.device)
        *totals, stop, save, bad = engine.sum(torch.cat([values, self.bad_loss[None]])).tolist()
        if self.last is not None:
            self.skips.judge(done, self.last, bad > 0)
        if stop:
            self._stop(done)
        if save:
            say(f"SIGUSR1: saved after step {done}" if self._save(done) else f"SIGUSR1: step {done} is saved already")
        return totals

    def _compute(self, step_data: Any, totals: list[float], step: int, lr: float) -> Metrics:
        """Forward, backward and update for one optimizer step; its metrics, summed over the micro-batches."""
        engine, objective, window = self.run.engine, self.run.objective, self.window
        micro_batches, metrics = objective.micro_batches(step_data), {}
        self.bad_loss = torch.zeros((), device=engine.device)
        engine.expect(len(micro_batches))
        for i, batch in enumerate(micro_batches):
            lifeline.at(f"step {step + 1}, forward and backward")
            self.run.meter.add(batch)
            tokens, padded = objective.sizes(batch)
            window.tokens, window.padded = window.tokens + tokens, window.padded + padded
            loss, shares = objective.loss(engine, batch.to(engine.device), totals, step, self.run.total)
            self.bad_loss = torch.maximum(self.bad_loss, (~torch.isfinite(loss.detach())).float())
            engine.backward(loss)
            _sum_into(metrics, shares)
            if i < len(micro_batches) - 1:
                engine.end_micro_batch()
        lifeline.at(f"step {step + 1}, update")
        self.last = engine.step(lr)
        self.skips.total += not self.last.applied
        window.add(metrics, self.last.applied)
        return metrics

    def _after(self, done: int, metrics: Metrics, lr: float) -> None:
        """Report, probe and save, where it is time."""
        run = self.run
        self.bar.update()
        if run.lexicon is not None and self.last.applied:
            for text in run.lexicon.look(done, metrics, run.engine.sum):
                say(f"warning: step {done}: {text}")
                self.log.write(done, {"warning": text})
        if done % run.logging.every == 0 or done == run.total:
            self._report(done, lr)
        lifeline.at(f"step {done}, probe")
        probing = time.perf_counter()
        self.figures = run.probe(done)
        improved = bool(self.figures) and self.figures[checkpoint.PROBE] > self.best
        if self.figures:
            self.best = max(self.best, self.figures[checkpoint.PROBE])
            self.log.write(done, self.figures)
            self.shown["MRR@10"] = f"{self.figures[checkpoint.PROBE]:.4f}"
            self.bar.set_postfix(self.shown)
            self.window.start += time.perf_counter() - probing  # as in `_save`
        every = run.logging.checkpoint_every
        if done == run.total or (every and (done % every == 0 or improved)):
            self._save(done)

    def _report(self, done: int, lr: float) -> None:
        values = self.window.report(self.run.engine, self.last)
        values |= self.run.meter.rates(values["seconds_per_step"] * self.window.steps)
        self.log.write(done, {**values, "lr": lr, "skipped": self.skips.total,
                              "examples": done * self.run.optimization.batch})
        self.shown |= {"loss": f"{values.get('loss', float('nan')):.3f}",
                       "tokens/s": f"{values['tokens_per_second']:.0f}"}
        self.bar.set_postfix(self.shown)
        self.window = _Window()

    def _save(self, done: int) -> bool:
        """A checkpoint of ``done`` steps; False where there is one already."""
        if done == self.saved:
            return False
        run, start = self.run, time.perf_counter()
        lifeline.at(f"step {done}, checkpoint")
        facts = {"objective": run.objective.state_dict(), "skipped": self.skips.total, "best_probe": self.best,
                 "said": [] if run.lexicon is None else run.lexicon.said, **run.facts}
        if self.figures:
            facts[checkpoint.PROBE] = self.figures[checkpoint.PROBE]
        checkpoint.save(run.engine, run.folder / "checkpoints", done, run.config, run.logging.keep, facts)
        self.saved = done
        self.window.start += time.perf_counter() - start  # rates are those of training
        return True

    def _stop(self, done: int) -> None:
        """End as a signal asked, with everything saved and reported."""
        if self.window.steps:
            lr = schedules.learning_rate(done - 1, self.run.total, self.run.optimization.lr,
                                         self.run.optimization.warmup)
            self._report(done, lr)
        self._save(done)
        where = f"saved as {self.run.folder / 'checkpoints' / f'step-{done}'}" if done else "nothing to save"
        raise Preempted(f"stopped after step {done}, {where}; --resume auto continues")
