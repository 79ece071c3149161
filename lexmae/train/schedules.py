"""Learning rate and λ as functions of the optimizer step: nothing to save, nothing to lose on resume."""

from __future__ import annotations

import math

from lexmae.config import OptimizationConfig


def total_steps(config: OptimizationConfig, examples: int) -> int:
    """Optimizer steps of a run over ``examples`` examples per epoch."""
    return config.steps if config.steps is not None else max(1, math.ceil(config.epochs * examples / config.batch))


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Rate of 0-based step ``step`` of ``total``: linear from 0 over the first ``warmup`` share, then linear to 0.

    The first step has ``peak / warm-up steps``, the last still a rate above 0.
    """
    rise = math.ceil(warmup * total)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (total - step) / max(1, total - rise)


def ramp(step: int, total: int, share: float) -> float:
    """Factor in [0, 1] on λ: quadratic over the first ``share`` of the steps (Paria et al. 2020), then 1."""
    rise = share * total
    return 1.0 if step >= rise else ((step + 1) / (rise + 1)) ** 2
