"""The log of a run: one JSON line and one TensorBoard entry per report, from rank 0."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lexmae.cli import is_main_rank


class MetricsLog:
    """Appends to ``log.jsonl`` and ``tensorboard/`` of a run; a resumed run continues behind its checkpoint.

    Args:
        folder: the run's folder.
        start: steps done; later lines, of steps that are computed again, are dropped.
    """

    def __init__(self, folder: Path, start: int = 0):
        self._path, self._writer = folder / "log.jsonl", None
        if not is_main_rank():
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, needed on rank 0 alone

        kept = [line for line in self._lines() if json.loads(line)["step"] <= start] if start else []
        self._path.write_text("".join(kept), encoding="utf-8")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def _lines(self) -> list[str]:
        if not self._path.is_file():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("}\n")]  # a killed run may have left half a line

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Report ``values`` as of ``step`` optimizer steps."""
        if self._writer is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with open(self._path, "a", encoding="utf-8") as out:
            out.write(json.dumps({"step": step, **clean}) + "\n")
        for name, value in clean.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush everything to disk."""
        if self._writer is not None:
            self._writer.close()
