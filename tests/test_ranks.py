"""Files and verdicts across ranks: real gloo processes, each with a folder of its own or a shared one."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, free_port

from lexmae import locks, ranks
from lexmae.config import PretrainRecipe
from lexmae.errors import InputError
from lexmae.ranks import Hosts, together
from lexmae.retrieval.encode import EncodeConfig, encode
from lexmae.train import command as training

PROGRAM = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from lexmae import cli
from lexmae.errors import InputError
from lexmae.ranks import Hosts, rank_and_world, together


def main(argv):
    rank, world = rank_and_world()
    folder = Path(sys.argv[1].format(rank=rank))
    with together():
        if rank == int(sys.argv[2]):
            raise InputError("bad input")
    dist.init_process_group("gloo")
    hosts = Hosts(folder)
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / f"rank-{rank}").write_bytes(bytes([rank]) * 200000)
    (folder / f"other-{rank}").touch()
    hosts.barrier()
    hosts.collect(folder, [f"sub/rank-{rank}"])
    received = hosts.hand_out(folder / "sub", folder / "received")
    agreed = hosts.agree(f"from {rank}")
    try:
        hosts.refuse_difference(seed=1, data="x" if rank < 2 else "y")
        differs = None
    except InputError as error:
        differs = error.reason
    print(json.dumps({"apart": hosts.apart, "leads": hosts.leads, "agreed": agreed, "differs": differs,
        "received": str(received.relative_to(folder)),
        "files": {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()},
        "copies": {p.name: p.read_bytes() == bytes([int(p.name[-1])]) * 200000 for p in received.iterdir()}}))


cli.run(main)  # as every command ends: gloo's threads may abort an interpreter that is taken down
"""


def start(tmp_path: Path, folder: str, world: int = 3, failing: int = -1) -> list[subprocess.CompletedProcess]:
    program, port = tmp_path / "program.py", str(free_port())
    program.write_text(PROGRAM, encoding="utf-8")
    started = [subprocess.Popen(
        [sys.executable, str(program), folder, str(failing)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_SIZE": "1",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}) for rank in range(world)]
    return [subprocess.CompletedProcess((), 0, *p.communicate(timeout=120)) if p.wait(120) == 0
            else subprocess.CompletedProcess((), p.returncode, *p.communicate()) for p in started]


@pytest.mark.slow
def test_folders_of_their_own(tmp_path):
    done = start(tmp_path, str(tmp_path / "host-{rank}"))
    assert [one.returncode for one in done] == [0, 0, 0], done
    found = [json.loads(one.stdout) for one in done]
    # one machine and one file system: what tells the hosts is that they do not see rank 0's folder
    assert [one["apart"] for one in found] == [[1, 2]] * 3
    assert [one["leads"] for one in found] == [True, True, True]
    assert [one["agreed"] for one in found] == ["from 0"] * 3
    assert found[0]["received"] == "sub" and [one["received"] for one in found[1:]] == ["received"] * 2
    every = {f"rank-{rank}": True for rank in range(3)}
    assert [one["copies"] for one in found] == [every] * 3
    assert set(found[0]["files"]) == {"sub/rank-0", "sub/rank-1", "sub/rank-2", "other-0"}
    assert set(found[1]["files"]) == {"received/rank-0", "received/rank-1", "received/rank-2", "other-1"}
    assert all("data on" in one["differs"] and "(rank 2) is 'y'" in one["differs"] for one in found)


@pytest.mark.slow
def test_a_shared_folder(tmp_path):
    done = start(tmp_path, str(tmp_path / "shared"))
    found = [json.loads(one.stdout) for one in done]
    assert [one["apart"] for one in found] == [[]] * 3
    assert [one["leads"] for one in found] == [True, False, False]
    assert [one["received"] for one in found] == ["sub"] * 3
    assert all(set(one["copies"]) == {"rank-0", "rank-1", "rank-2"} for one in found)


@pytest.mark.slow
def test_bad_input_of_one_rank_stops_all(tmp_path):
    done = start(tmp_path, str(tmp_path), failing=1)
    assert [one.returncode for one in done] == [2, 2, 2]
    assert "bad input" in done[1].stderr


@pytest.mark.parametrize("others, code", [("ok", None), ("failed", 2)])
def test_what_is_held_for_a_run_is_left_where_there_is_none(tmp_path, monkeypatch, others, code):
    said = []
    monkeypatch.setattr(ranks, "several_hosts", lambda: True)
    monkeypatch.setattr(ranks, "_exchange", lambda value: said.append(value) or [value, others])
    file = locks.lock_file(tmp_path / "a")
    if code is None:
        with together() as held:
            held.enter_context(locks.writing(tmp_path / "a"))
        with held:
            assert file.exists()
    else:
        with pytest.raises(SystemExit) as stop, together() as held:
            held.enter_context(locks.writing(tmp_path / "a"))
        assert stop.value.code == code
    assert not file.exists() and said == ["ok"]


@pytest.mark.parametrize("error", [InputError("is being written"), FileExistsError("file")])
def test_an_error_of_this_host_is_told_to_the_others(monkeypatch, error):
    said = []
    monkeypatch.setattr(ranks, "several_hosts", lambda: True)
    monkeypatch.setattr(ranks, "_exchange", lambda value: said.append(value) or [value, "ok"])
    with pytest.raises(type(error)), together():
        raise error
    assert said == ["failed"]


@pytest.mark.parametrize("command", ["train", "encode"])
def test_a_lock_that_another_command_holds_stops_the_other_hosts(command, tmp_path, monkeypatch, shards_dir, model_dir):
    said, output = [], tmp_path / "out"
    monkeypatch.setattr(ranks, "several_hosts", lambda: True)
    monkeypatch.setattr(ranks, "_exchange", lambda value: said.append(value) or [value, "ok"])
    with open(locks.lock_file(output), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="out: is being written by another process"):
            if command == "encode":
                encode(model_dir, shards_dir, output, EncodeConfig("docs"))
            else:
                (tmp_path / "r.yaml").write_text(f"data: {shards_dir}\noutput: {output}\nmodel: {{init: scratch}}\n"
                                                 "deepspeed: ds_configs/fp32_zero1.json\noptimization: {steps: 1}\n")
                training.main(PretrainRecipe, argparse.ArgumentParser(), [str(tmp_path / "r.yaml")])
    assert said == ["failed"]


def test_one_process_is_its_own_host(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    hosts = Hosts(tmp_path / "absent")
    assert hosts.leads and hosts.sees and hosts.apart == [] and not ranks.several_hosts()
    assert hosts.agree({"a": 1}) == {"a": 1}
    hosts.barrier()
    hosts.collect(tmp_path)
    hosts.refuse_difference(recipe=1)
    assert hosts.hand_out(tmp_path, tmp_path / "received") == tmp_path
    assert list(tmp_path.iterdir()) == []  # nothing is made


@pytest.mark.parametrize(("environment", "expected"), [
    ({"WORLD_SIZE": "4", "LOCAL_SIZE": "4"}, False), ({"WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, True),
    ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, False), ({"WORLD_SIZE": "1"}, False)])
def test_several_hosts(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.several_hosts() is expected
