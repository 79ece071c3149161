"""Steering λ: a simulated model comes to its budget from both sides; the state is all there is to keep."""

from __future__ import annotations

import json
import math

import pytest

from lexmae.config import ActiveTermsConfig, LossConfig
from lexmae.errors import InputError
from lexmae.train.sparsity import Controller, Lambdas


def simulate(controller: Controller, steps: int, terms: float, elasticity: float = 0.4, delay: float = 0.05,
             noise: float = 0.0) -> list[float]:
    """Terms of a model that follows λ slowly, as training does.

    Args:
        elasticity: log terms falls by this much as log λ rises by 1.
        delay: share of the steps in which the model goes two thirds of the way.
    """
    seen, lag = [], math.exp(-1 / (delay * steps))
    for step in range(steps):
        wanted = 60.0 * (controller.value / 1e-3) ** -elasticity
        terms = lag * terms + (1 - lag) * wanted
        controller.observe(terms * (1 + noise * math.sin(1.7 * step)), steps)
        seen.append(terms)
    return seen


@pytest.mark.parametrize("budget", [30.0, 60.0, 128.0])
@pytest.mark.parametrize("begin", [5000.0, 20.0])
@pytest.mark.parametrize("steps", [300, 5000])
@pytest.mark.parametrize("delay", [0.02, 0.1])
def test_a_budget_is_reached_from_both_sides(budget, begin, steps, delay):
    seen = simulate(Controller(1e-3, budget), steps, begin, delay=delay, noise=0.1)
    assert all(terms == pytest.approx(budget, rel=0.1) for terms in seen[-steps // 20:])


def test_a_budget_out_of_reach_does_not_run_away():
    controller = Controller(1e-3, 10.0)
    for _ in range(5000):
        controller.observe(4000.0, 1000)  # whatever λ is
    assert controller.value == pytest.approx(1e-3 * 1e4)
    for _ in range(5000):
        controller.observe(0.0, 1000)  # an empty lexicon
    assert controller.value == pytest.approx(1e-3 / 1e4)


def test_the_state_is_all_there_is():
    one = Controller(1e-3, 64.0)
    simulate(one, 50, 4000.0)
    other = Controller(1e-3, 64.0)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert simulate(one, 20, 100.0) == simulate(other, 20, 100.0) and one.value == other.value


def test_without_a_budget_lambda_is_the_recipes():
    lambdas = Lambdas(LossConfig(lambda_docs=0.4, lambda_ramp=0.5))
    lambdas.observe(9, 10, 1e6, 1e6)
    assert lambdas.at(9, 10) == pytest.approx((0.4, 0.3)) and lambdas.at(0, 10)[0] == pytest.approx(0.4 / 36)
    assert lambdas.state_dict() == {}


def test_sides_are_steered_apart_and_after_the_ramp():
    config = LossConfig(lambda_docs=0.4, lambda_ramp=0.5, active_terms=ActiveTermsConfig(docs=100))
    lambdas = Lambdas(config)
    lambdas.observe(0, 10, 1000.0, 1000.0)
    assert lambdas.at(5, 10) == pytest.approx((0.4, 0.3)), "it still grows"
    lambdas.observe(5, 10, 1000.0, 1000.0)
    assert lambdas.at(6, 10)[0] > 0.4 and lambdas.at(6, 10)[1] == pytest.approx(0.3)
    again = Lambdas(config)
    again.load_state_dict(lambdas.state_dict())
    assert again.at(7, 10) == lambdas.at(7, 10)


def test_a_budget_needs_something_to_steer():
    for wrong in ({"lambda_docs": 0.0}, {"regulariser_docs": "none"}):
        with pytest.raises(InputError, match="active_terms.docs: needs a regulariser"):
            LossConfig(active_terms=ActiveTermsConfig(docs=100), **wrong)
