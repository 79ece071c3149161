"""What the commands of retrieval share: outputs that must be new, figures as JSON, aligned tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lexmae import artifact
from lexmae.errors import InputError


def refuse_existing(*paths: str | Path | None, overwrite: bool = False) -> None:
    """InputError for the first output file that exists already, unless it may be replaced. None is no output."""
    for path in paths:
        if path is None:
            continue
        if Path(path).is_dir():
            raise InputError("is a directory, a file is needed here", path)
        if Path(path).exists() and not overwrite:
            raise InputError("already exists; remove it, choose another output, or add --overwrite", path)


def write_json(path: str | Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures, replacing an older report; None writes nothing."""
    if path is not None:
        with artifact.atomic_file(path) as out:
            json.dump(figures, out, indent=1, ensure_ascii=False)
            out.write("\n")


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as lines of aligned columns: the first column to the left, the others to the right."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
                     for row in rows)
