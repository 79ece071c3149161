"""kill -9 at random moments: the same command again finishes, with the result of a run that was never disturbed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, environment, log, reseal, run
from test_launch import TINY, weights, write_recipe

from lexmae import artifact
from lexmae.data.corpus import Passage, Query, write_beir

KILLS = 3
DOCUMENTS = 9000  # three blocks of encoding


def killed(command: list[str], seconds: float) -> float | None:
    """Start a command in a session of its own and kill all of it after so many seconds.

    Returns None where it was still running, else the seconds it took. Fails where the command ended by itself with an
    error.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment(), start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert process.wait(timeout=seconds) == 0
        return time.perf_counter() - start
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def disturbed(command: list[str], output: Path, duration: float, seed: int, run_folder: Path | None = None) -> int:
    """Run a command several times, kill each at a random moment, then let it finish; the number of kills, at least one.

    A run that was faster than its kill counts for nothing: what it made is removed, and the next kill comes within
    half of the time it took. A kill soon comes before Python has started, so this ends on any machine.

    Args:
        output: a folder or file that appears when the command has finished. At each start it is absent or complete.
        duration: seconds that the command takes, roughly.
        run_folder: what the command makes, where that is more than ``output`` and its unfinished form.
    """
    moments, kills = random.Random(seed), 0
    while kills < KILLS:
        took = killed(command, moments.uniform(0.2, 0.95) * duration)
        kills += took is None
        if output.is_dir():
            artifact.verify(output)
        if output.exists() and kills:
            break
        if took is not None:
            assert output.exists()
            remove(run_folder or output)
            duration = took / 2
    if not output.exists():
        run(command)
        assert not artifact.partial_path(output).exists()
    if output.is_dir():
        artifact.verify(output)
    return kills


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def disturbed_file(command: Callable[[Path], list[str]], folder: Path, seed: int) -> int:
    """Run a command that writes a file with and without kills, and compare; the number of kills."""
    duration, output = timed(command(folder / "undisturbed")), folder / "disturbed"
    kills = disturbed(command(output), output, duration, seed)
    assert output.read_bytes() == (folder / "undisturbed").read_bytes()
    return kills


def timed(command: list[str]) -> float:
    """Seconds that an undisturbed run of a command takes."""
    start = time.perf_counter()
    run(command)
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A collection of many short passages."""
    drawn = np.random.default_rng(3)
    words = [f"{a}{b}" for a in ("mer", "tol", "ban", "ris", "gul") for b in ("ka", "no", "sel", "dim", "fo", "wen")]
    folder = tmp_path_factory.mktemp("many") / "beir"
    write_beir(folder, (Passage(f"d{i}", "", " ".join(drawn.choice(words, 6))) for i in range(DOCUMENTS)),
               [Query("q", words[0])], {})
    return folder


def prepare(source: Path, output: Path) -> list[str]:
    return ["tools/prepare.py", "--input", str(source), "--output", str(output), "--train-tokenizer", "140",
            "--max-length", "16"]


@pytest.mark.slow
def test_prepare_and_encode(many, model_dir, shards_dir, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    duration = timed(prepare(many, whole))
    assert disturbed(prepare(many, broken), broken, duration, seed=1) > 0
    assert artifact.read(broken).fingerprint == artifact.read(whole).fingerprint
    # The model belongs to other shards with a vocabulary as large: their tokenizer takes the place of this one's.
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    ours = artifact.read(whole).extra["tokenizer_hash"]
    reseal(model, lambda record: record["extra"].update(tokenizer_hash=ours))

    def encode(output: Path) -> list[str]:
        return ["tools/encode.py", "--model", str(model), "--data", str(whole), "--side", "docs", "--output",
                str(output)]

    duration = timed(encode(tmp_path / "vectors"))
    assert disturbed(encode(tmp_path / "again"), tmp_path / "again", duration, seed=2) > 0
    assert artifact.read(tmp_path / "again").fingerprint == artifact.read(tmp_path / "vectors").fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_training(kind, shards_dir, tmp_path):
    model = {**TINY, "size": {**TINY["size"], "hidden_dropout_prob": 0.1}}
    commands = []
    for name in ("whole", "broken"):
        recipe = write_recipe(tmp_path / name, kind, shards_dir, model=model,
                              logging={"every": 1, "checkpoint_every": 1})
        commands.append([f"launch/{kind}.py", str(recipe), "--set", "optimization.steps=40", "--resume", "auto"])
    duration = timed(commands[0])
    broken_run = tmp_path / "broken" / "run"
    assert disturbed(commands[1], broken_run / "model", duration, 3, broken_run) > 0
    whole, broken = log(tmp_path / "whole" / "run"), log(broken_run)
    assert [line["loss"] for line in broken] == [line["loss"] for line in whole]
    assert len(whole) == 40
    expected, got = weights(tmp_path / "whole" / "run"), weights(broken_run)
    assert all((got[name] == tensor).all() for name, tensor in expected.items())
