"""One writer at a time: who holds a lock is named, it dies with its process, and readers do not ask for it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, environment, run

from lexmae import artifact, locks
from lexmae.errors import InputError
from lexmae.retrieval import engines, updates
from lexmae.retrieval.vectors import SparseVectors

HOLD = """
import sys, time
from lexmae import locks
with locks.writing(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder():
    """Starts processes that hold the lock of a path; they end with the test."""
    started = []

    def hold(path: Path) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, env=environment() | {
            "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def vectors(names: str, side: str = "docs") -> SparseVectors:
    """A vector of two terms for every letter."""
    n = len(names)
    return SparseVectors(list(names), np.arange(0, 2 * n + 1, 2), np.tile(np.array([0, 1], np.int32), n),
                         np.arange(1, 2 * n + 1).astype(np.uint16), ["x", "y"], {"side": side})


def test_a_block_within_a_block_costs_nothing(tmp_path):
    path = tmp_path / "a"
    with locks.writing(path), locks.writing(tmp_path / "." / "a"):
        assert locks.lock_file(path).exists()
        with locks.writing(tmp_path / "other"):
            pass
    assert list(tmp_path.iterdir()) == []
    with locks.writing(path, here=False), locks.writing(path):
        pass


def test_another_thread_is_refused(tmp_path):
    refused = []

    def work() -> None:
        try:
            with locks.writing(tmp_path / "a"):
                pass
        except InputError as error:
            refused.append(str(error))

    with locks.writing(tmp_path / "a"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"is being written by process {os.getpid()} on " in refused[0]


def test_another_process_is_named_and_its_death_frees_the_lock(tmp_path, holder):
    process = holder(tmp_path / "a")
    with pytest.raises(InputError, match=rf"a: is being written by process {process.pid} on .* since 20") as error, \
            artifact.create(tmp_path / "a", "x"):
        pass
    assert "\n" not in str(error.value) and not (tmp_path / "a.partial").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert locks.lock_file(tmp_path / "a").exists()  # what a killed process leaves locks nothing
    with artifact.create(tmp_path / "a", "x"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_forked_child_holds_nothing(tmp_path):
    ready, done = os.pipe(), os.pipe()
    with locks.writing(tmp_path / "a"):
        child = os.fork()
        if not child:
            try:
                os.write(ready[1], b"x")
                os.read(done[0], 1)
            finally:
                os._exit(0)
        os.read(ready[0], 1)
    with locks.writing(tmp_path / "a"):  # though the child is alive
        pass
    os.write(done[1], b"x")
    os.waitpid(child, 0)


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, capsys):
    def refuse(handle: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locks.writing(tmp_path / "a"):
        pass
    assert "no lock (Operation not supported); two commands that write" in capsys.readouterr().err


def test_a_lock_that_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """The holder removes the file between another's opening and locking it."""
    file, flock, calls = locks.lock_file(tmp_path / "a"), fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not calls:
            file.unlink()
        calls.append(handle)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locks.writing(tmp_path / "a"):
        assert len(calls) == 2 and locks._has_name(locks._held[file].handle, file)


def test_two_changes_of_an_index(tmp_path, holder):
    for name, letters in (("v", "abc"), ("new", "de")):
        vectors(letters).save(tmp_path / name)
    engines.build(tmp_path / "v", "exact", tmp_path / "i")
    (tmp_path / "gone").write_text("a\n")
    process = holder(tmp_path / "i")
    for change in (lambda: updates.add(tmp_path / "i", tmp_path / "new"), lambda: updates.compact(tmp_path / "i"),
                   lambda: updates.delete(tmp_path / "i", tmp_path / "gone")):
        with pytest.raises(InputError, match=f"is being written by process {process.pid} "):
            change()
    assert len(engines.open_index(tmp_path / "i").search(vectors("q", "queries"), 5)["q"]) == 3  # readers go on
    process.kill()
    process.wait()
    updates.add(tmp_path / "i", tmp_path / "new")
    assert len(engines.open_index(tmp_path / "i")) == 5


@pytest.mark.slow
def test_commands_refuse_in_one_line(tmp_path, holder, model_dir, shards_dir, beir_dir):
    vectors("abc").save(tmp_path / "v")
    recipe = tmp_path / "p.yaml"
    recipe.write_text(f"data: {shards_dir}\noutput: {tmp_path / 'out'}\ndeepspeed: ds_configs/fp32_zero1.json\n"
                      "optimization: {batch: 2, steps: 1}\n")
    commands = [["tools/index.py", "--vectors", "v"], ["tools/export.py", "--vectors", "v", "--format", "csr"],
                ["tools/prepare.py", "--input", str(beir_dir), "--train-tokenizer", "99"],
                ["tools/encode.py", "--model", str(model_dir), "--data", str(shards_dir), "--side", "docs"]]
    process = holder(tmp_path / "out")
    for command in commands:
        command = [part if part != "v" else str(tmp_path / "v") for part in command]
        errors = run([*command, "--output", str(tmp_path / "out")], code=2).splitlines()
        assert f"out: is being written by process {process.pid} on" in errors[-1], errors
    errors = run(["launch/pretrain.py", str(recipe)], code=2).splitlines()
    assert f"out: is being written by process {process.pid} on" in errors[-1], errors
    assert not (tmp_path / "out").exists()
