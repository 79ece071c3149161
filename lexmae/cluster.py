"""Checks of a cluster before a run: every host of a hostfile is asked about itself through ssh, and compared.

Each check is one line: ``ok``, ``warning`` (it will run, but perhaps not as meant) or ``error`` (it cannot run).
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexmae.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lexmae", "torch", "deepspeed", "transformers", "tokenizers", "numpy", "pyarrow")
_PROBE = Path(__file__).with_name("cluster_probe.py")
_CLOCK = 1.0  # seconds of difference worth a warning
_SLOW = 1e8  # bytes per second, about a gigabit: gradients of a BERT-base take seconds below it
_TIMEOUT = 120.0  # seconds for one command on a host


@dataclass(frozen=True)
class Done:
    """A command on a host: exit code, output, errors, and how long it took in seconds."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Finding:
    """One check: ``level`` is ``ok``, ``warning`` or ``error``."""

    level: str
    host: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.host}: {self.text}"


Remote = Callable[[str, Sequence[str], str], Done]  # host, command, its standard input


def ssh(host: str, command: Sequence[str], text: str = "") -> Done:
    """Run a command on a host through ssh, which may not ask for a password."""
    line = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host, shlex.join(command)]
    return _run(line, text)


def local(host: str, command: Sequence[str], text: str = "") -> Done:
    """The same for this machine."""
    return _run(list(command), text)


def _run(command: Sequence[str], text: str) -> Done:
    start = time.perf_counter()
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_TIMEOUT)
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        code, out, err = 124, "", f"no answer within {_TIMEOUT:.0f} s"
    except OSError as error:
        code, out, err = 127, "", str(error)
    return Done(code, out, err, time.perf_counter() - start)


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Host → slots of a DeepSpeed hostfile.

    Raises:
        InputError: a line is not ``NAME slots=N``, a host occurs twice, or there is none.
    """
    path, found = Path(path), {}
    if not path.is_file():
        raise InputError("no such hostfile", path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error.reason}", path) from error
    for number, line in enumerate(lines, 1):
        if not (line := line.strip()) or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([0-9]{1,6})", line)
        if not match or int(match[2]) < 1 or match[1].startswith("-"):
            raise InputError("a line is `NAME slots=N`; comments stand on lines of their own", path, number)
        if match[1] in found:
            raise InputError(f"{match[1]} occurs twice", path, number)
        found[match[1]] = int(match[2])
    if not found:
        raise InputError("names no host", path)
    return found


def check(hosts: Mapping[str, int], paths: Sequence[str] = (), *, port: int = 29500, remote: Remote = ssh,
          python: str = sys.executable, measure: bool = True) -> Iterator[Finding]:
    """All checks, each finding as it is known; the first host is where the launcher and rank 0 run.

    Args:
        hosts: name → number of slots.
        paths: folders of this machine that every host must see.
        port: of the launcher's ``--master_port``.
        python: interpreter, which must be at the same path everywhere.
        measure: whether to measure latency and bandwidth between neighbours of the list.
    """
    if len(hosts) > 1:
        yield from _launcher(remote, hosts)
    with _marks(paths) as mark, ThreadPoolExecutor(len(hosts)) as pool:
        asked = json.dumps({"root": str(ROOT), "packages": PACKAGES, "port": port, "paths": list(paths), "mark": mark})
        answers = dict(zip(hosts, pool.map(lambda host: _ask(remote, host, python, asked), hosts), strict=True))
    told: dict[str, dict[str, Any]] = {}
    for host, answer in answers.items():
        if isinstance(answer, Finding):
            yield answer
        else:
            told[host] = answer
            yield Finding("ok", host, "answers through ssh without a password" if remote is ssh else "answers")
    for host, facts in told.items():
        yield from _compare(host, facts, next(iter(told.items())), hosts[host])
        yield _clock(remote, host)
        yield from _paths(host, facts["paths"])
    first = next(iter(hosts))
    if first in told:
        free = told[first]["port_free"]
        state = "free" if free else "in use"
        yield Finding("ok" if free else "error", first, f"port {port} is {state} (--master_port)")
    if measure and len(told) > 1:
        yield from _network(remote, told, python, port)


def _launcher(remote: Remote, hosts: Mapping[str, int]) -> Iterator[Finding]:
    """What this machine needs to start a run on others."""
    if remote is not ssh:
        return
    found = shutil.which("pdsh")
    yield Finding("ok", "here", f"pdsh is {found}") if found else Finding(
        "error", "here", "pdsh is not installed: the deepspeed launcher needs it, or another --launcher")
    for host in hosts:
        settings = _run(["ssh", "-G", host], "").out
        if re.search(r"^serveraliveinterval 0$", settings, re.MULTILINE):
            yield Finding("warning", host, "ssh has no ServerAliveInterval: the launcher would wait for hours if the "
                                           "host died; set `ServerAliveInterval 10` in ~/.ssh/config")


@contextlib.contextmanager
def _marks(paths: Sequence[str]) -> Iterator[str]:
    """A file in each path, to be sought from the other hosts."""
    mark, made = f".lexmae-check-{uuid.uuid4().hex}", []
    try:
        for path in paths:
            if not Path(path).is_dir():
                raise InputError("no such folder on this machine", path)
            (Path(path) / mark).touch()
            made.append(Path(path) / mark)
        yield mark
    finally:
        for file in made:
            file.unlink(missing_ok=True)


def _ask(remote: Remote, host: str, python: str, asked: str) -> dict[str, Any] | Finding:
    done = remote(host, [python, "-", "facts", asked], _PROBE.read_text(encoding="utf-8"))
    if done.code:
        reason = done.err.strip().splitlines()[-1:] or ["no reason given"]
        what = {255: "is not reachable by ssh without a password", 127: f"has no {python}"}.get(
            done.code, "does not run the check")
        return Finding("error", host, f"{what} ({reason[0]})")
    try:
        return json.loads(done.out.splitlines()[-1])
    except (ValueError, IndexError):
        return Finding("error", host, f"prints {done.out[:80]!r} where JSON is expected: a login script that talks?")


def _compare(host: str, facts: dict[str, Any], reference: tuple[str, dict[str, Any]], slots: int) -> Iterator[Finding]:
    first, theirs = reference
    wanted = {"Python": theirs["python"], **theirs["versions"]}
    have = {"Python": facts["python"], **facts["versions"]}
    differing = [f"{name} {have[name]} (on {first} {wanted[name]})" for name in wanted if have[name] != wanted[name]]
    absent = [name for name, version in have.items() if version is None and name in ("torch", "deepspeed")]
    if differing or absent:
        yield Finding("error", host, "; ".join(differing + [f"{name} is not installed" for name in absent]))
    else:
        yield Finding("ok", host, f"Python {have['Python']}, torch {have['torch']}, deepspeed {have['deepspeed']}, "
                                  f"transformers {have['transformers']}")
    if facts["checksum"] is None:
        yield Finding("error", host, f"the project is not at {ROOT}")
    elif facts["checksum"] != theirs["checksum"]:
        commits = f"commit {facts['commit'][:10] or 'unknown'}, there {theirs['commit'][:10] or 'unknown'}"
        yield Finding("error", host, f"the project differs from that of {first} ({commits})")
    else:
        yield Finding("ok", host, f"the project is at {ROOT}, checksum {facts['checksum'][:12]}")
    gpus = facts["gpus"]
    if gpus == 0:
        yield Finding("warning", host, f"no GPU; {slots} slots will compute on the CPU (DS_ACCELERATOR=cpu in "
                                       "~/.deepspeed_env)")
    else:
        level = "error" if slots > gpus else "warning" if slots < gpus else "ok"
        yield Finding(level, host, f"{gpus} GPUs, {slots} slots in the hostfile")


def _clock(remote: Remote, host: str) -> Finding:
    before = time.time()
    done = remote(host, ["date", "+%s.%N"], "")
    after = time.time()
    try:
        there = float(done.out)
    except ValueError:
        return Finding("warning", host, "its clock cannot be read")
    apart = max(0.0, before - there, there - after)  # the answer was given between the two
    if apart > _CLOCK:
        return Finding("warning", host, f"its clock is at least {apart:.1f} s off")
    return Finding("ok", host, f"its clock agrees to {max(after - before, apart):.1f} s")


def _paths(host: str, paths: Mapping[str, Mapping[str, bool]]) -> Iterator[Finding]:
    for path, is_ in paths.items():
        if not is_["exists"]:
            yield Finding("error", host, f"{path} does not exist")
        elif not is_["shared"]:
            yield Finding("warning", host, f"{path} is its own, not shared: inputs must be equal copies; checkpoints "
                                           "are sent to the first host, which is slow for large models")
        elif not is_["writable"]:
            yield Finding("error", host, f"{path} cannot be written")
        else:
            yield Finding("ok", host, f"{path} is shared and can be written")


def _network(remote: Remote, told: Mapping[str, dict[str, Any]], python: str, port: int) -> Iterator[Finding]:
    """Each host to the next of the list, the last to the first where there are more than two."""
    names = list(told)
    for i, server in enumerate(names if len(names) > 2 else names[:1]):
        client = names[(i + 1) % len(names)]
        where = port if i == 0 and told[server]["port_free"] else told[server]["free_port"]
        address = (told[server]["addresses"] or [server])[0]  # which is what the launcher takes for the first host
        yield _measure(remote, python, server, client, address, where)


def _measure(remote: Remote, python: str, server: str, client: str, address: str, port: int) -> Finding:
    source = _PROBE.read_text(encoding="utf-8")
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(remote, server, [python, "-", "serve", str(port)], source)
        done = remote(client, [python, "-", "measure", address, str(port)], source)
        served = serving.result()
    if done.code:
        reason = (done.err.strip().splitlines() or served.err.strip().splitlines() or ["no reason given"])[-1]
        return Finding("error", client, f"cannot connect to {server} ({address}, port {port}): {reason}")
    found = json.loads(done.out.splitlines()[-1])
    text = (f"to {server} ({address}): {found['bandwidth'] / 1e6:.0f} MB/s, "
            f"{found['latency'] * 1e3:.2f} ms there and back")
    return Finding("ok" if found["bandwidth"] >= _SLOW else "warning", client, text)
