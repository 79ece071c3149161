"""Signals to a run: stop when the step is finished, or save and go on.

| signal | what the run does |
|---|---|
| SIGTERM, SIGINT (Ctrl-C) | finishes its step, saves, ends with exit code 75 |
| SIGINT again | ends at once, exit code 130 |
| SIGUSR1 | finishes its step, saves, goes on |

One rank that is signalled is enough: the ranks tell each other at every step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from lexmae.cli import say

_STOP = (signal.SIGTERM, signal.SIGINT)
_NUMBERS = (*_STOP, signal.SIGUSR1)


class Signals:
    """Takes signals while the block runs; those before it are back afterwards.

    The main thread may be inside of a collective for long, where Python runs no handler. So the handlers do nothing,
    and a thread reads the numbers that the interpreter writes into a pipe when a signal arrives.
    """

    def __init__(self) -> None:
        self.stop = False
        self._save = self._interrupted = False
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, _noted) for number in _NUMBERS}
            threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._pipe is not None:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe[1])  # which ends the thread

    def asked(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save; a request to save is told once."""
        save, self._save = self._save, False
        return self.stop, save

    def _watch(self) -> None:
        source = self._pipe[0]
        while numbers := os.read(source, 64):
            for number in numbers:
                self._take(number)
        os.close(source)

    def _take(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self._save = True
        elif number in _STOP:
            if number == signal.SIGINT and self._interrupted:
                print("interrupted", file=sys.stderr, flush=True)
                os._exit(130)
            if not self.stop:
                name = signal.Signals(number).name
                say(f"{name}: finishing the step, then saving" + "; once more to stop at once" * (name == "SIGINT"))
            self.stop, self._interrupted = True, self._interrupted or number == signal.SIGINT


def _noted(number: int, frame: FrameType | None) -> None:
    """In place of the default, which would end the process."""
