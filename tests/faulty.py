"""A training command with a fault on one rank: ``faulty.py nan|sleep RANK STEP KIND RECIPE …``.

From 0-based step STEP on the loss is no number on that rank, or its data never come.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lexmae import cli  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    fault, rank, step, kind, *arguments = [one for one in sys.argv[1:] if not one.startswith("--local_rank")]
    if os.environ.get("RANK", "0") == rank:
        {"nan": not_a_number, "sleep": fall_asleep}[fault](int(step))
    importlib.import_module(f"launch.{kind}").main(arguments)


def not_a_number(first: int) -> None:
    from lexmae.train.objectives import PretrainObjective

    inner = PretrainObjective.loss

    def loss(self, forward, batch, totals, step, total_steps):
        loss, metrics = inner(self, forward, batch, totals, step, total_steps)
        return loss * float("nan") if step >= first else loss, metrics

    PretrainObjective.loss = loss


def fall_asleep(first: int) -> None:
    from lexmae.data.batches import PretrainData

    inner = PretrainData.__call__

    def data(self, step):
        if step >= first:
            time.sleep(3600)
        return inner(self, step)

    PretrainData.__call__ = data


if __name__ == "__main__":
    cli.run(main)
