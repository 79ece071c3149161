"""The one error that means "the input is wrong": a reason and, where known, the file and the line."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """What a user gave cannot be used. Commands print it as one line and exit with code 2.

    Args:
        reason: what is wrong, and where it helps, what would be right.
        path: the file or folder concerned.
        line: 1-based line number within ``path``.
    """

    def __init__(self, reason: str, path: str | Path | None = None, line: int | None = None):
        self.reason, self.path, self.line = reason, path, line
        where = "" if path is None else f"{path}:{line}: " if line is not None else f"{path}: "
        super().__init__(f"{where}{reason}")

    def __reduce__(self):
        return type(self), (self.reason, self.path, self.line)
