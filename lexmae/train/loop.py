"""One training loop for every objective."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lexmae.cli import progress
from lexmae.config import LoggingConfig, OptimizationConfig
from lexmae.data.batches import prefetch
from lexmae.train import checkpoint, schedules
from lexmae.train.engine import Engine, StepReport
from lexmae.train.flops import Meter
from lexmae.train.metrics_log import MetricsLog
from lexmae.train.objectives import Metrics, Objective


class Diverged(RuntimeError):
    """The loss or a gradient is not finite; the last checkpoint is intact."""


@dataclass
class Run:
    """One run: what is trained, on what, how long, and where it reports.

    Attributes:
        data: optimizer step → this rank's part of its batch.
        config: the composed recipe, kept in checkpoints.
        folder: the run's folder.
        probe: optimizer steps done → figures of a probe, none where none is due.
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
    probe: Callable[[int], dict[str, float]] = lambda step: {}
    meter: Meter = field(default_factory=Meter)


class _Window:
    """Sums of what happened since the last report."""

    def __init__(self):
        self.metrics: Metrics = {}
        self.steps = self.tokens = self.padded = 0
        self.waited, self.start = 0.0, time.perf_counter()

    def add(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0) + value

    def report(self, engine: Engine, last: StepReport) -> dict[str, Any]:
        """Means over the window; a collective call."""
        names = list(self.metrics)
        own = [*(self.metrics[name].float() for name in names), float(self.tokens), float(self.padded)]
        sums = engine.sum(torch.stack([torch.as_tensor(v, dtype=torch.float32, device=engine.device) for v in own]))
        *means, tokens, padded = sums.tolist()
        seconds = time.perf_counter() - self.start
        return {**{name: value / self.steps for name, value in zip(names, means, strict=True)},
                "grad_norm": last.grad_norm, "loss_scale": last.loss_scale, "tokens_per_second": tokens / seconds,
                "padding": 1 - tokens / max(1.0, padded), "data_wait": self.waited / seconds,
                "seconds_per_step": seconds / self.steps}


def train(run: Run, start: int = 0) -> None:
    """Train from step ``start`` to the end, with reports and checkpoints on the way.

    Raises:
        Diverged: a loss or gradient is not finite where no loss scaling would skip the step.
    """
    run.engine.module.train()
    log = MetricsLog(run.folder, start)
    checkpoints = run.folder / "checkpoints"
    bar = progress(total=run.total, desc=run.folder.name, unit="step", initial=start)
    batches = prefetch(run.data, start, run.total, device=run.engine.device)
    window, shown = _Window(), {}
    try:
        for step in range(start, run.total):
            waiting = time.perf_counter()
            step_data = next(batches)
            window.waited += time.perf_counter() - waiting
            lr = schedules.learning_rate(step, run.total, run.optimization.lr, run.optimization.warmup)
            last = _one_step(run, step_data, step, lr, window)
            done = step + 1
            bar.update()
            if done % run.logging.every == 0 or done == run.total:
                values = window.report(run.engine, last)
                values |= run.meter.rates(values["seconds_per_step"] * window.steps)
                _refuse_divergence(run.engine, done, values["loss"])
                log.write(done, {**values, "lr": lr, "examples": done * run.optimization.batch})
                shown |= {"loss": f"{values['loss']:.3f}", "tokens/s": f"{values['tokens_per_second']:.0f}"}
                bar.set_postfix(shown)
                window = _Window()
            probing = time.perf_counter()
            if figures := run.probe(done):
                log.write(done, figures)
                shown["MRR@10"] = f"{figures['probe_mrr_10']:.4f}"
                bar.set_postfix(shown)
                window.start += time.perf_counter() - probing  # rates are those of training
            every = run.logging.checkpoint_every
            if done == run.total or (every and done % every == 0):
                checkpoint.save(run.engine, checkpoints, done, run.config, run.logging.keep,
                                run.objective.state_dict())
    finally:
        batches.close()
        bar.close()
        log.close()


def _one_step(run: Run, step_data: Any, step: int, lr: float, window: _Window) -> StepReport:
    """Forward, backward and update for one optimizer step."""
    engine, objective = run.engine, run.objective
    totals = engine.sum(torch.tensor([float(n) for n in objective.counts(step_data)], device=engine.device)).tolist()
    micro_batches = objective.micro_batches(step_data)
    engine.expect(len(micro_batches))
    for i, batch in enumerate(micro_batches):
        run.meter.add(batch)
        tokens, padded = objective.sizes(batch)
        window.tokens, window.padded = window.tokens + tokens, window.padded + padded
        loss, metrics = objective.loss(engine, batch.to(engine.device), totals, step, run.total)
        engine.backward(loss)
        window.add(metrics)
        if i < len(micro_batches) - 1:
            engine.end_micro_batch()
    window.steps += 1
    report = engine.step(lr)
    if report.applied and report.grad_norm is not None and not math.isfinite(report.grad_norm):
        raise Diverged(f"the gradient is not finite at step {step + 1}")
    return report


def _refuse_divergence(engine: Engine, step: int, loss: float) -> None:
    if not math.isfinite(loss) and engine.hardware.precision != "fp16":
        raise Diverged(f"the loss is not finite at step {step}")
