"""Files and verdicts across ranks: real gloo processes, each with a folder of its own or a shared one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, free_port

from lexmae import ranks
from lexmae.ranks import Hosts

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
