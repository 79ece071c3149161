"""How much sparsity weighs: λ of documents and queries, as the recipe ramps it or as a controller steers it.

All of it is arithmetic on plain numbers that every rank sees alike, so nothing crosses ranks and a checkpoint holds it
in a few floats.
"""

from __future__ import annotations

import math
from typing import Any

from lexmae.config import LossConfig
from lexmae.train import schedules

_MEMORY = 0.9  # of the smoothed number of terms, per step
_PROPORTIONAL = 3.0
_GAIN, _LARGEST_GAIN = 36.0, 0.2  # of the integral: the first divided by the steps of the run, at most the second
_ERROR = (-1.0, 0.5)
_RANGE = math.log(1e4)  # λ stays within this factor of its start


class Controller:
    """Steers λ so that the mean number of active terms comes to a budget.

        error     = log(smoothed terms / budget), cut to [−1, 0.5]
        integral += gain · error
        λ         = start · exp(integral + 3 · error)

    Terms answer to λ with an elasticity and a delay of many steps, in which the model follows. For such a plant
    proportional and integral action in the logarithm settle without swinging, whatever λ has to become. The delay grows
    with the length of a run, whose learning rate is chosen with it; so does 1 / gain. λ rises more slowly than it
    falls: a term whose logit no text makes positive has no gradient to come back by.

    Args:
        start: λ before the first measurement.
        budget: active terms that are wanted.
    """

    def __init__(self, start: float, budget: float):
        self.start, self.budget = start, budget
        self.integral = self.smoothed = self.seen = 0.0  # ``seen``: weight of all measurements in ``smoothed``

    @property
    def value(self) -> float:
        """λ for the next step."""
        return self.start * math.exp(_within(self.integral + _PROPORTIONAL * self._error(), -_RANGE, _RANGE))

    def observe(self, terms: float, total: int) -> None:
        """Take the mean number of active terms of one of ``total`` steps."""
        self.smoothed = _MEMORY * self.smoothed + (1 - _MEMORY) * terms
        self.seen = _MEMORY * self.seen + (1 - _MEMORY)
        gain = min(_LARGEST_GAIN, _GAIN / total)
        self.integral = _within(self.integral + gain * self._error(), -_RANGE, _RANGE)

    def _error(self) -> float:
        if self.seen == 0:
            return 0.0
        terms = self.smoothed / self.seen
        return _within(math.log(terms / self.budget), *_ERROR) if terms > 0 else _ERROR[0]

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"integral": self.integral, "smoothed": self.smoothed, "seen": self.seen}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what ``state_dict`` gave."""
        self.integral, self.smoothed, self.seen = (float(state[key]) for key in ("integral", "smoothed", "seen"))


def _within(value: float, lowest: float, highest: float) -> float:
    return min(highest, max(lowest, value))


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
                self.controllers[side].observe(terms, total)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {side: controller.state_dict() for side, controller in self.controllers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        for side, values in state.items():
            self.controllers[side].load_state_dict(values)
