"""Runs the steps of a plan as commands, and skips those that are finished."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from lexmae import artifact, cli, locks
from lexmae.checked import read_json
from lexmae.cycle.steps import Step
from lexmae.errors import InputError
from lexmae.renaming import remove

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = "deepspeed"
_EDITABLE = "corpus"  # the kind of a folder of text, which its owner may edit


class Runner:
    """Runs steps that are not finished, and remembers in ``steps.json`` what each was made from.

    Args:
        work: folder of the pipeline.
        ranks: processes of steps that train or encode, started by the deepspeed launcher where there are several.
        hostfile: DeepSpeed hostfile, for several machines.
        redo: replace what was made with other settings or inputs, where otherwise it is an error.

    Raises:
        InputError: ``steps.json`` is not what a pipeline writes.
    """

    def __init__(self, work: Path, ranks: int = 1, hostfile: str | None = None, redo: bool = False):
        self.work, self.book = work, work / "steps.json"
        self.ranks, self.hostfile, self.redo = ranks, hostfile, redo
        self.records = _read_book(self.book) if self.book.is_file() else {}

    def run(self, step: Step, position: str) -> None:
        """Run one step, or skip it.

        Raises:
            SystemExit: the command failed; its own exit code.
        """
        key = _digest([step.counted, step.settings, [_content(path, self.work) for path in step.inputs]])
        record = self.records.get(step.name)
        same = record is not None and record["key"] == key
        finished = step.output.exists()
        if same and finished and record["seconds"] is None and step.resumes:  # stopped before it could be noted
            record = {"key": key, "seconds": 0.0}
            self._note(step.name, record)
        if same and finished and record["seconds"] is not None:
            cli.say(f"[{position}] {step.name}: finished before ({record['seconds']:.0f} s)")
            return
        if not same and not self.redo and (finished or _checkpoints(step)):
            raise InputError(f"was made with other settings or inputs than step {step.name} now has; "
                             "choose another work=FOLDER, or replace it with --redo",
                             step.output if finished else step.output.parent)
        if not (step.resumes and same):
            _remove(step)
        self._note(step.name, {"key": key, "seconds": None})
        command = self._launch(step)
        cli.say(f"[{position}] {step.name}: {shlex.join(command)}")
        start = time.time()
        code = _wait(command)
        if code:
            cli.say(f"step {step.name} failed with exit code {code}; the same command goes on from here, where its "
                    "inputs are the same")
            raise SystemExit(code if 0 < code < 128 else 1)
        if not step.output.exists():
            raise InputError(f"step {step.name} ended without making it", step.output)
        self._note(step.name, {"key": key, "seconds": round(time.time() - start, 1)})

    def seconds(self, names: list[str]) -> dict[str, float]:
        """What each step took when it ran, in seconds."""
        return {name: self.records[name]["seconds"] for name in names}

    def _launch(self, step: Step) -> list[str]:
        script = [str(ROOT / step.command[0]) if step.command[0].endswith(".py") else step.command[0],
                  *step.command[1:]]
        if not step.trains or (self.ranks == 1 and not self.hostfile):
            return [sys.executable, *script]
        launcher = [str(Path(sys.executable).with_name(LAUNCHER))]
        return [*launcher, *(["--hostfile", self.hostfile] if self.hostfile
                             else ["--num_gpus", str(self.ranks)]), *script]

    def _note(self, name: str, record: dict[str, Any]) -> None:
        self.records[name] = record
        with artifact.atomic_file(self.book) as out:
            json.dump(self.records, out, indent=1)


def _wait(command: list[str]) -> int:
    """Run a command; its exit code. It may have something to save before it ends: Ctrl-C reaches it too, and SIGTERM
    is passed on."""
    process = subprocess.Popen(command, cwd=Path.cwd())
    previous = signal.signal(signal.SIGTERM, lambda *_: _terminate(process, Path(command[0]).name == LAUNCHER))
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait()
        finally:  # also where Ctrl-C comes again
            process.kill()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(process: subprocess.Popen, launched: bool) -> None:
    """SIGTERM for a command; of the deepspeed launcher for what it has started, since it passes none on itself."""
    if not launched:
        process.terminate()
        return
    for child in psutil.Process(process.pid).children():
        child.terminate()


def visible_gpus() -> int:
    """Number of GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def _checkpoints(step: Step) -> list[Path]:
    """What an unfinished training has come to."""
    return sorted((step.output.parent / "checkpoints").glob("step-*")) if step.output.name == "model" else []


def _remove(step: Step) -> None:
    """What an earlier command of that name left; training keeps nothing of a run with other settings."""
    stale = step.output.parent if step.output.name == "model" else step.output
    for path in (artifact.partial_path(step.output), stale):
        remove(path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _read_book(path: Path) -> dict[str, Any]:
    """What is known of each step: its key, and its seconds, None where it did not come to its end."""
    records = read_json(path, dict)
    for name, record in records.items():
        if not (isinstance(record, dict) and isinstance(record.get("key"), str)
                and isinstance(record.get("seconds", ""), (int, float, type(None)))):
            raise InputError(f"its entry of the step '{name}' is not one that a pipeline writes", path)
    return records


def _content(path: Path, work: Path) -> Any:
    """What identifies the content of an input: an artifact's fingerprint, a file's checksum, a folder's listing,
    without the work folder and its lock where they lie in it."""
    if artifact.exists(path) and (made := artifact.read(path)).kind != _EDITABLE:
        return made.fingerprint
    if path.is_file():
        return artifact.checksum(path)
    if path.is_dir():
        here, places = os.path.realpath(path), (os.path.realpath(work), locks.lock_file(work))
        own = [os.path.relpath(place, here) for place in places]
        names = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}
        return [[name, p.stat().st_size, p.stat().st_mtime_ns] for name, p in names.items()
                if not any(Path(name).is_relative_to(place) for place in own)]
    return str(path)
