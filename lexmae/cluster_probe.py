"""What a host tells about itself, for ``launch/check_cluster.py``: a program that is sent to it through ssh.

It needs nothing but Python, so that it can also tell what is missing:

    python - facts JSON      versions, checksum of the project, GPUs, ports, paths; prints one JSON object
    python - serve PORT      answers one measurement and ends
    python - measure ADDRESS PORT   latency and bandwidth to it; prints one JSON object
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

SOURCES = ("lexmae", "launch", "tools", "recipes", "ds_configs")
_SECONDS, _ROUNDS, _BLOCK = 1.0, 200, 1 << 18


def facts(asked: dict) -> dict:
    """Args: asked: ``root`` of the project, ``packages``, ``port``, ``paths`` and ``mark``, a file sought in them."""
    return {"host": socket.gethostname(), "addresses": _output(["hostname", "-I"]).split(),
            "python": platform.python_version(), "versions": {name: _version(name) for name in asked["packages"]},
            "checksum": checksum(Path(asked["root"])),
            "commit": _output(["git", "-C", asked["root"], "rev-parse", "HEAD"]).strip(),
            "gpus": sum(line.startswith("GPU ") for line in _output(["nvidia-smi", "-L"]).splitlines()),
            "port_free": _is_free(asked["port"]), "free_port": _free_port(),
            "paths": {path: _path(Path(path), asked["mark"]) for path in asked["paths"]}}


def checksum(root: Path) -> str | None:
    """sha256 over the project's sources, by name and content; None where there is no project."""
    if not (root / "lexmae" / "__init__.py").is_file():
        return None
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".yaml", ".json", ".sh"):
                digest.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _path(path: Path, mark: str) -> dict:
    end = time.monotonic() + 3  # a network file system may show a new file late
    while path.is_dir() and not (path / mark).exists() and time.monotonic() < end:
        time.sleep(0.1)
    return {"exists": path.is_dir(), "shared": (path / mark).exists(), "writable": os.access(path, os.W_OK)}


def serve(port: int, patience: float = 30.0) -> None:
    """Answer one ``measure``: echo single bytes, then swallow blocks and acknowledge their sum."""
    with socket.create_server(("", port)) as server:
        server.settimeout(patience)
        peer, _ = server.accept()
        with peer:
            peer.settimeout(patience)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(_ROUNDS):
                peer.sendall(_receive(peer, 1))
            size = struct.unpack("!Q", _receive(peer, 8))[0]
            while size:
                for _ in range(size):
                    _receive(peer, _BLOCK)
                peer.sendall(b"k")
                size = struct.unpack("!Q", _receive(peer, 8))[0]


def measure(address: str, port: int, patience: float = 20.0) -> dict:
    """Median round trip of a byte in seconds, and bytes per second over about a second."""
    with _connect(address, port, patience) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            peer.sendall(b"x")
            _receive(peer, 1)
            trips.append(time.perf_counter() - start)
        block, start, sent, blocks = bytes(_BLOCK), time.perf_counter(), 0, 1
        while (seconds := time.perf_counter() - start) < _SECONDS:
            peer.sendall(struct.pack("!Q", blocks))
            for _ in range(blocks):
                peer.sendall(block)
            _receive(peer, 1)
            sent, blocks = sent + blocks, min(2 * blocks, 1024)
        peer.sendall(struct.pack("!Q", 0))
        return {"latency": statistics.median(trips), "bandwidth": sent * _BLOCK / seconds}


def _connect(address: str, port: int, patience: float) -> socket.socket:
    end = time.monotonic() + patience
    while True:
        try:
            return socket.create_connection((address, port), timeout=patience)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _receive(peer: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = peer.recv(size - len(found))
        if not part:
            raise ConnectionError("the other side has gone")
        found += part
    return bytes(found)


def main(arguments: list[str]) -> None:
    """As the head of this file says."""
    verb, *rest = arguments
    if verb == "facts":
        print(json.dumps(facts(json.loads(rest[0]))))
    elif verb == "serve":
        serve(int(rest[0]))
    else:
        print(json.dumps(measure(rest[0], int(rest[1]))))


if __name__ == "__main__":
    main(sys.argv[1:])
