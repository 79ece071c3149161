"""The log of a run: one JSON line and one TensorBoard entry per report, from rank 0."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lexmae.artifact import atomic_file
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

        before = self._path.read_text(encoding="utf-8") if self._path.is_file() else ""
        kept = "".join(line for line in _whole(before) if json.loads(line)["step"] <= start) if start else ""
        if kept != before:
            with atomic_file(self._path) as out:
                out.write(kept)
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

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


def _whole(text: str) -> list[str]:
    """Its lines; a killed run may have left half of one."""
    return [line for line in text.splitlines(keepends=True) if line.endswith("}\n")]
