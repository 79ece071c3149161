"""Ranks as threads of one process, where the work of ranks is tested without starting any."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from lexmae.ranks import Hosts


def thread_hosts(local: threading.local, barrier: threading.Barrier) -> type[Hosts]:
    """In place of ``Hosts``: the ranks ``local.rank`` share a folder, and wait at ``barrier``."""
    box: list[Any] = [None]

    class Threads(Hosts):
        def __init__(self, folder: str | Path):
            super().__init__(folder)
            self.rank, self.leads = local.rank, local.rank == 0

        def barrier(self) -> None:
            barrier.wait(60)

        def agree(self, value: Any) -> Any:
            if self.rank == 0:
                box[0] = value
            self.barrier()
            return box[0]

    return Threads
