"""Starts the project's commands as a user does, for the tests that need real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from lexmae import artifact

ROOT = Path(__file__).parents[1]
TINY = {"init": "scratch", "size": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                                    "intermediate_size": 64, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
                                    "attention_probs_dropout_prob": 0.0}}


def run(command: list[str], ranks: int = 0, code: int = 0) -> str:
    """Run a script with plain Python, or through the deepspeed launcher on ``ranks`` processes; returns its stderr.

    Fails where the exit code is not ``code``.
    """
    start = [sys.executable]
    if ranks:
        start = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks), "--master_port",
                 str(free_port())]
    done = subprocess.run([*start, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stderr


def environment() -> dict[str, str]:
    """What the commands are started with: one thread, no GPU, the scripts of this installation."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def reseal(folder: Path, change: Callable[[dict], object] = lambda record: None) -> None:
    """Make a manifest right for the files that are there, after ``change`` of what it says: as if written so."""
    record = json.loads((folder / artifact.MANIFEST).read_text(encoding="utf-8"))
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    names.remove(artifact.MANIFEST)
    record["files"] = {name: artifact.checksum(folder / name) for name in names}
    record["sizes"] = {name: (folder / name).stat().st_size for name in names}
    record["fingerprint"] = artifact.fingerprint(record["files"])
    change(record)
    (folder / artifact.MANIFEST).write_text(artifact.signed(record), encoding="utf-8")


def free_port() -> int:
    """A port on which nobody listens."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def log(folder: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
