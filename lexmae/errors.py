"""What ends a command in one line: input that is wrong, and a run that cannot go on or was asked to stop."""

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


def one_line(error: BaseException) -> str:
    """What a library's error says, as one line of at most 300 characters; its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that lies outside of its input. One line, exit code ``code``."""

    code = 1


class Preempted(RunError):
    """A run that was asked to stop and has saved what it had: exit code 75 (``EX_TEMPFAIL``), do it again later."""

    code = 75
