"""How much sparsity weighs: λ of documents and queries, as the recipe ramps it or as a controller steers it.

All of it is arithmetic on plain numbers that every rank sees alike, so nothing crosses ranks and a checkpoint holds it
in a few floats.
"""

from __future__ import annotations

import math
from typing import Any

from lexmae.config import LossConfig
from lexmae.train import schedules

_SMOOTHING = 0.9  # of the measured number of terms, per step
_PROPORTIONAL, _INTEGRAL = 0.5, 0.02  # gains on log(terms / budget), per step
_LARGEST_ERROR = 1.0  # of that logarithm: far from the budget λ moves at a bounded rate
_RANGE = math.log(1e4)  # λ stays within this factor of the recipe's


class Controller:
    """Steers λ so that the mean number of active terms comes to a budget.

    A proportional-integral controller in logarithms: with the error e = log(terms / budget), cut to ±1,
    ``log λ = log λ₀ + 0.5·e + Σ 0.02·e``. Terms are smoothed over about ten steps. Since e is a ratio, the same gains
    serve any budget.

    Args:
        start: λ₀, where λ begins.
        budget: active terms that are wanted.
    """

    def __init__(self, start: float, budget: float):
        self.start, self.budget = start, budget
        self.terms: float | None = None
        self.integral = 0.0

    @property
    def value(self) -> float:
        """λ for the next step."""
        return self.start * math.exp(min(_RANGE, max(-_RANGE, self.integral + _PROPORTIONAL * self._error())))

    def observe(self, terms: float) -> None:
        """Take the mean number of active terms of one global batch."""
        self.terms = terms if self.terms is None else _SMOOTHING * self.terms + (1 - _SMOOTHING) * terms
        self.integral = min(_RANGE, max(-_RANGE, self.integral + _INTEGRAL * self._error()))

    def _error(self) -> float:
        if self.terms is None:
            return 0.0
        error = math.log(max(self.terms, 0.5) / self.budget)
        return min(_LARGEST_ERROR, max(-_LARGEST_ERROR, error))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"terms": self.terms, "integral": self.integral}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.terms, self.integral = state["terms"], state["integral"]


class Lambdas:
    """λ_d and λ_q of each step: the recipe's, grown over the ramp, steered where a budget of active terms is given."""

    def __init__(self, config: LossConfig):
        self.config = config
        budgets = {"docs": config.active_terms.docs, "queries": config.active_terms.queries}
        starts = {"docs": config.lambda_docs, "queries": config.query_weight}
        self.starts = starts
        self.controllers = {side: Controller(starts[side], budget) for side, budget in budgets.items() if budget}

    def at(self, step: int, total: int) -> tuple[float, float]:
        """λ_d and λ_q of 0-based step ``step`` of ``total``."""
        growth = schedules.ramp(step, total, self.config.lambda_ramp)
        values = {side: self.controllers[side].value if side in self.controllers else start
                  for side, start in self.starts.items()}
        return growth * values["docs"], growth * values["queries"]

    def observe(self, step: int, total: int, terms_docs: float, terms_queries: float) -> None:
        """Take what a step measured; the controllers begin where the ramp ends."""
        if schedules.ramp(step, total, self.config.lambda_ramp) < 1:
            return
        for side, terms in (("docs", terms_docs), ("queries", terms_queries)):
            if side in self.controllers:
                self.controllers[side].observe(terms)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {side: controller.state_dict() for side, controller in self.controllers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        for side, values in state.items():
            self.controllers[side].load_state_dict(values)
