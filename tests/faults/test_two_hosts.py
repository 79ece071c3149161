"""Two hosts, each with its own network, processes and name: the same result, and clear ends where one dies."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import ROOT, log, run
from test_launch import weights, write_recipe
from two_hosts import TwoHosts, missing, two_hosts

from lexmae import artifact
from lexmae.retrieval.encode import EncodeConfig, encode

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture
def hosts(tmp_path) -> Iterator[TwoHosts]:
    folder = tmp_path / "hosts"
    folder.mkdir()
    with two_hosts(folder) as made:
        yield made


def test_the_check_of_a_cluster(hosts, site):
    """A shared folder, a folder that is not, a project at the same place; then a host that is not reachable."""
    hosts.hosts[1].mount(hosts.folder / "bin", site)
    check = ["launch/check_cluster.py", "--hostfile", str(hosts.hostfile), "--path", str(hosts.folder), "--path",
             str(site)]
    output = hosts.finish(hosts.start(sys.executable, *check))
    for line in ("ok       host-b: Python ", f"ok       host-b: the project is at {ROOT}, checksum ",
                 f"ok       host-b: {hosts.folder} is shared and can be written",
                 f"warning  host-b: {site} is its own, not shared", "host-b: to host-a (10.231.77.1): ",
                 "ok       host-a: port 29500 is free", "2 host(s): 0 error(s), "):
        assert line in output, output
    hosts.hosts[1].kill()
    output = hosts.finish(hosts.start(sys.executable, *check, "--no-measure"), code=2)
    assert "error    host-b: is not reachable by ssh without a password" in output


@pytest.fixture
def site(tmp_path, shards_dir) -> Path:
    """A folder with a copy of the data, as each host has one."""
    folder = tmp_path / "site"
    shutil.copytree(shards_dir, folder / "shards")
    return folder


def own_copy(hosts: TwoHosts, site: Path) -> Path:
    """The second host has its own copy of the site; returns where it lies."""
    copy = site.with_name("site-of-b")
    shutil.copytree(site, copy)
    hosts.hosts[1].mount(copy, site)
    return copy


def assert_same_run(one: Path, two: Path) -> None:
    lines = log(one), log(two)
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for a, b in zip(*lines, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
    expected, got = weights(one), weights(two)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_two_hosts_with_a_shared_folder_train_like_two_ranks_of_one(hosts, shards_dir, tmp_path):
    recipes = [write_recipe(tmp_path / name, "pretrain", shards_dir) for name in ("one", "two")]
    run(["launch/pretrain.py", str(recipes[0])], ranks=2)
    hosts.finish(hosts.launch("launch/pretrain.py", str(recipes[1])))
    assert_same_run(tmp_path / "one" / "run", tmp_path / "two" / "run")


def test_two_hosts_with_a_folder_each(hosts, site, tmp_path):
    """Training, resuming and encoding: what is kept lies on the first host."""
    whole = write_recipe(tmp_path / "whole", "finetune", site / "shards")
    run(["launch/finetune.py", str(whole)], ranks=2)
    recipe = str(write_recipe(site, "finetune", site / "shards"))
    other = own_copy(hosts, site)
    hosts.finish(hosts.launch("launch/finetune.py", recipe))
    assert_same_run(tmp_path / "whole" / "run", site / "run")
    assert [path.name for path in sorted((site / "run" / "checkpoints").iterdir())] == ["step-3", "step-6"]
    assert not (other / "run" / "model").exists() and not list((other / "run").rglob("step-*"))
    for path in ("model", "checkpoints/step-6"):
        shutil.rmtree(site / "run" / path)
    output = hosts.finish(hosts.launch("launch/finetune.py", recipe, "--resume", "auto"))
    assert "resuming from" in output
    assert_same_run(tmp_path / "whole" / "run", site / "run")
    assert list((other / "run" / "checkpoints").iterdir()) == []
    shutil.copytree(site / "run" / "model", other / "run" / "model")
    command = ["tools/encode.py", "--model", str(site / "run" / "model"), "--data", str(site / "shards"), "--side"]
    hosts.finish(hosts.launch(*command, "docs", "--output", str(site / "vectors")))
    encode(site / "run" / "model", site / "shards", tmp_path / "vectors", EncodeConfig("docs"))
    assert artifact.read(site / "vectors").fingerprint == artifact.read(tmp_path / "vectors").fingerprint
    assert not list(other.glob("vectors*"))


def test_a_host_that_falls_silent_is_named_within_a_minute(hosts, shards_dir, tmp_path):
    """The cable is cut: both sides stop, and the run goes on from its checkpoint once it is mended."""
    recipe = str(write_recipe(tmp_path, "pretrain", shards_dir, logging={"every": 1, "checkpoint_every": 10}))
    process = hosts.launch("launch/pretrain.py", recipe, "--set", "optimization.steps=400")
    while not (tmp_path / "run" / "checkpoints" / "step-10").exists():
        assert process.poll() is None, hosts.output()
        time.sleep(0.1)
    hosts.cut()
    start = time.monotonic()
    output = hosts.finish(process, code=None, timeout=60)
    assert "rank 1 on host-b has given no sign of life" in output
    while any("pretrain.py" in line for line in hosts.hosts[1].processes().values()):
        assert time.monotonic() - start < 60
        time.sleep(0.5)
    hosts.mend()
    output = hosts.finish(hosts.launch("launch/pretrain.py", recipe, "--resume", "auto", "--set",
                                       "optimization.steps=400", "logging.checkpoint_every=400"))
    assert "resuming from" in output
    assert [line["step"] for line in log(tmp_path / "run")] == list(range(1, 401))


def test_what_one_host_lacks_stops_both(hosts, site):
    recipe = write_recipe(site, "pretrain", site / "shards")
    copy = own_copy(hosts, site)
    (copy / recipe.name).unlink()
    start = time.monotonic()
    output = hosts.finish(hosts.launch("launch/pretrain.py", str(recipe)), code=None)
    assert f"error: on host-b: {recipe}: no such recipe" in output
    assert time.monotonic() - start < 60
