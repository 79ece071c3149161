"""Learning rate, λ and the number of steps as functions of the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lexmae.config import OptimizationConfig
from lexmae.train import schedules


@pytest.mark.parametrize("config, examples, expected", [
    ({"epochs": 20, "batch": 2048}, 8_841_823, 86346),  # 86345.93
    ({"epochs": 3, "batch": 24}, 532_761, 66596),
    ({"epochs": 1, "batch": 10}, 10, 1),
    ({"epochs": 1, "batch": 10}, 11, 2),
    ({"epochs": 0.5, "batch": 10}, 100, 5),
    ({"epochs": 0.001, "batch": 1000}, 10, 1),
    ({"epochs": 20, "batch": 10, "steps": 7}, 10**6, 7),
])
def test_number_of_steps(config, examples, expected):
    assert schedules.total_steps(OptimizationConfig(**config), examples) == expected


def reference(total: int, peak: float, rise: int) -> list[float]:
    """Rates of the usual linear schedule with warm-up, read one step on so that no step has the rate 0."""
    def factor(step: int) -> float:
        return (step + 1) / rise if step < rise else (total - step) / (total - rise)

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("total, warmup, rise", [(100, 0.05, 5), (101, 0.05, 6), (10, 0.5, 5), (7, 0.01, 1)])
def test_the_learning_rate_rises_and_falls_linearly(total, warmup, rise):
    found = [schedules.learning_rate(step, total, 3e-4, warmup) for step in range(total)]
    assert found == pytest.approx(reference(total, 3e-4, rise))
    assert max(found) == pytest.approx(3e-4) and found.index(max(found)) == rise - 1
    assert min(found) > 0
    assert np.allclose(np.diff(found[:rise]), 3e-4 / rise)
    assert np.allclose(np.diff(found[rise:]), -3e-4 / (total - rise))


@pytest.mark.parametrize("total, warmup", [(1, 0.05), (1, 0.0), (1, 1.0), (2, 0.05), (5, 1.0)])
def test_short_runs_have_a_rate(total, warmup):
    found = [schedules.learning_rate(step, total, 1.0, warmup) for step in range(total)]
    assert all(0 < rate <= 1 for rate in found) and max(found) == 1


def test_without_warmup_the_first_step_has_the_peak():
    assert [schedules.learning_rate(step, 4, 1.0, 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_lambda_grows_quadratically():
    found = [schedules.ramp(step, 100, 0.2) for step in range(100)]
    assert found[20:] == [1.0] * 80
    assert np.allclose(np.sqrt(found[:20]), np.arange(1, 21) / 21)
    assert all(schedules.ramp(step, 10, 0.0) == 1.0 for step in range(10))
    assert schedules.ramp(9, 10, 1.0) == pytest.approx((10 / 11) ** 2)
