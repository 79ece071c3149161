"""The check of a cluster: a fake ssh whose hosts answer as told; the probe itself, run for real on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lexmae import cluster, cluster_probe
from lexmae.cluster import ROOT, Done, check, read_hostfile
from lexmae.errors import InputError

FACTS = {"host": "a", "addresses": ["10.0.0.1"], "python": "3.11.7", "checksum": "c" * 64, "commit": "d" * 40,
         "versions": dict.fromkeys(cluster.PACKAGES, "1.0"), "gpus": 8, "port_free": True, "free_port": 4711,
         "paths": {}}


class Fake:
    """Hosts that answer with ``FACTS``, changed as told; ``codes`` are failures of ssh."""

    def __init__(self, changes: dict[str, dict] | None = None, codes: dict[str, tuple[int, str]] | None = None):
        self.changes, self.codes, self.seen = changes or {}, codes or {}, []

    def __call__(self, host: str, command, text: str) -> Done:
        self.seen.append((host, list(command)))
        if host in self.codes:
            return Done(self.codes[host][0], "", self.codes[host][1], 0.1)
        if command[0] == "date":
            return Done(0, str(time.time() + self.changes.get(host, {}).get("clock", 0.0)), "", 0.01)
        if command[2] == "facts":
            assert text == Path(cluster_probe.__file__).read_text(encoding="utf-8")
            asked = json.loads(command[3])
            facts = {**FACTS, "paths": {p: {"exists": True, "shared": (Path(p) / asked["mark"]).exists(),
                                            "writable": True} for p in asked["paths"]}}
            return Done(0, "Welcome!\n" + json.dumps(facts | self.changes.get(host, {})), "", 0.1)
        if command[2] == "serve":
            return Done(0, "", "", 1.0)
        return Done(0, json.dumps({"latency": 2e-4, "bandwidth": 1.2e9} | self.changes.get(host, {})), "", 1.0)


def lines(fake: Fake, hosts: dict[str, int] | None = None, **options) -> list[str]:
    return [str(finding) for finding in check(hosts or {"a": 8, "b": 8}, remote=fake, **options)]


def test_equal_hosts_have_no_complaint(tmp_path):
    fake = Fake()
    found = lines(fake, paths=[str(tmp_path)])
    assert all(line.startswith("ok ") for line in found), found
    assert f"ok       b: {tmp_path} is shared and can be written" in found
    assert "ok       b: 8 GPUs, 8 slots in the hostfile" in found
    assert "ok       b: to a (10.0.0.1): 1200 MB/s, 0.20 ms there and back" in found
    assert list(tmp_path.iterdir()) == []  # the mark is taken away
    assert ("a", [sys.executable, "-", "serve", "29500"]) in fake.seen  # rank 0's port is what is tried


@pytest.mark.parametrize(("change", "line"), [
    ({"versions": FACTS["versions"] | {"torch": "0.9"}}, "error    b: torch 0.9 (on a 1.0)"),
    ({"versions": FACTS["versions"] | {"deepspeed": None}},
     "error    b: deepspeed None (on a 1.0); deepspeed is not installed"),
    ({"python": "3.10.2"}, "error    b: Python 3.10.2 (on a 3.11.7)"),
    ({"checksum": None}, f"error    b: the project is not at {ROOT}"),
    ({"checksum": "e" * 64, "commit": ""},
     "error    b: the project differs from that of a (commit unknown, there dddddddddd)"),
    ({"gpus": 4}, "error    b: 4 GPUs, 8 slots in the hostfile"),
    ({"gpus": 16}, "warning  b: 16 GPUs, 8 slots in the hostfile"),
    ({"gpus": 0}, "warning  b: no GPU; 8 slots will compute on the CPU (DS_ACCELERATOR=cpu in ~/.deepspeed_env)"),
    ({"bandwidth": 5e7}, "warning  b: to a (10.0.0.1): 50 MB/s, 0.20 ms there and back"),
    ({"paths": {"/x": {"exists": False, "shared": False, "writable": False}}}, "error    b: /x does not exist"),
    ({"paths": {"/x": {"exists": True, "shared": True, "writable": False}}}, "error    b: /x cannot be written"),
    ({"paths": {"/x": {"exists": True, "shared": False, "writable": True}}},
     "warning  b: /x is its own, not shared: inputs must be equal copies; checkpoints are sent to the first host, "
     "which is slow for large models"),
])
def test_what_differs_is_one_line(change, line):
    found = lines(Fake({"b": change}))
    assert [text for text in found if not text.startswith("ok")] == [line]


def test_clocks_ports_and_unreachable_hosts():
    found = lines(Fake({"a": {"port_free": False}, "b": {"clock": 90.0}},
                       {"c": (255, "c: Permission denied (publickey)."), "d": (127, "sh: no such file")}),
                  {"a": 8, "b": 8, "c": 8, "d": 8})
    bad = [line for line in found if not line.startswith("ok")]
    assert bad[0] == "error    c: is not reachable by ssh without a password (c: Permission denied (publickey).)"
    assert bad[1] == f"error    d: has no {sys.executable} (sh: no such file)"
    assert bad[2].startswith("warning  b: its clock is at least ") and bad[2].endswith(" s off")
    assert bad[3] == "error    a: port 29500 is in use (--master_port)"
    assert any("b: to a" in line for line in found)  # the others are checked all the same


def test_a_ring_of_three_is_measured():
    fake = Fake()
    assert sum("there and back" in line for line in lines(fake, {"a": 8, "b": 8, "c": 8})) == 3
    assert sum("there and back" in line for line in lines(fake, measure=False)) == 0


def test_the_probe_tells_what_is_here(tmp_path):
    """Run as on a host: the program on standard input of a plain Python."""
    (tmp_path / "mark").touch()
    asked = json.dumps({"root": str(ROOT), "packages": ["torch", "no-such"], "port": 1, "mark": "mark",
                        "paths": [str(tmp_path), str(tmp_path / "absent")]})
    source = Path(cluster_probe.__file__).read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "-I", "-", "facts", asked], input=source, capture_output=True, text=True)
    told = json.loads(done.stdout)
    import torch

    assert told["versions"] == {"torch": torch.__version__, "no-such": None}
    assert told["checksum"] == cluster_probe.checksum(ROOT)
    assert told["paths"][str(tmp_path)] == {"exists": True, "shared": True, "writable": True}
    assert told["paths"][str(tmp_path / "absent")] == {"exists": False, "shared": False, "writable": False}


def test_the_checksum_follows_sources_alone(tmp_path):
    (tmp_path / "lexmae").mkdir()
    assert cluster_probe.checksum(tmp_path) is None
    source = tmp_path / "lexmae" / "__init__.py"
    source.write_text("a = 1\n", encoding="utf-8")
    before = cluster_probe.checksum(tmp_path)
    (tmp_path / "lexmae" / "notes.pyc").touch()
    assert cluster_probe.checksum(tmp_path) == before
    source.write_text("a = 2\n", encoding="utf-8")
    assert cluster_probe.checksum(tmp_path) != before


def test_latency_and_bandwidth_between_two_sockets(monkeypatch):
    monkeypatch.setattr(cluster_probe, "_SECONDS", 0.1)
    port = cluster_probe._free_port()
    server = threading.Thread(target=cluster_probe.serve, args=(port,))
    server.start()
    found = cluster_probe.measure("127.0.0.1", port)
    server.join(5)
    assert not server.is_alive()
    assert 0 < found["latency"] < 0.5 and found["bandwidth"] > 1e6


@pytest.mark.parametrize(("text", "reason"), [
    ("a slots=1\nb\n", "hostfile:2: a line is `NAME slots=N`"), ("a slots=1\na slots=2", "hostfile:2: a occurs twice"),
    ("# nothing\n\n", "names no host"), ("a slots=0", "a line is"), ("-oProxyCommand=x slots=1", "a line is"),
    (b"\xff slots=1", "not UTF-8")])
def test_bad_hostfiles(tmp_path, text, reason):
    path = tmp_path / "hostfile"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=reason):
        read_hostfile(path)


def test_hostfiles(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# two\nworker-1 slots=8\n\n  10.0.0.2   slots=4  \n", encoding="utf-8")
    assert read_hostfile(path) == {"worker-1": 8, "10.0.0.2": 4}
    with pytest.raises(InputError, match="no such hostfile"):
        read_hostfile(tmp_path / "absent")
    assert list(read_hostfile(ROOT / "launch" / "hostfile.example").values()) == [4, 4]


def test_a_path_that_is_not_here(tmp_path):
    with pytest.raises(InputError, match="no such folder on this machine"):
        lines(Fake(), paths=[str(tmp_path / "absent")])


@pytest.mark.parametrize(("gpus", "code"), [(8, 0), (4, 2)])
def test_exit_code(monkeypatch, tmp_path, capsys, gpus, code):
    import runpy

    (tmp_path / "hostfile").write_text("a slots=8\n", encoding="utf-8")
    monkeypatch.setattr(cluster, "ssh", Fake({"a": {"gpus": gpus}}))
    main = runpy.run_path(str(ROOT / "launch" / "check_cluster.py"))["main"]
    assert main(["--hostfile", str(tmp_path / "hostfile")]) == code
    assert capsys.readouterr().out.splitlines()[-1] == f"1 host(s): {int(code > 0)} error(s), 0 warning(s)"
