"""Ranks on several hosts: which of them see rank 0's folder, and files for those that do not.

Where the hosts share no storage, everything that is kept lies on rank 0's host. What the ranks of other hosts write
(parts of a checkpoint, parts of vectors) is sent there, and what they need to continue is sent back. torch is imported
inside functions, so that light commands may import this file.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lexmae import artifact
from lexmae.errors import InputError

_CHUNK = 1 << 26  # bytes sent at a time
_MEETING = 300.0  # seconds that ranks wait for each other before a run
_PATIENCE = 3.0  # seconds: a network file system may show a new file late


def host() -> str:
    """The name of this machine."""
    return socket.gethostname()


def rank_and_world() -> tuple[int, int]:
    """What the launcher says this process is; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def several_hosts() -> bool:
    """Whether the launcher started ranks on more than this machine."""
    local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
    return rank_and_world()[1] > int(local)


@contextlib.contextmanager
def together() -> Iterator[contextlib.ExitStack]:
    """Around the checks before a run on several hosts: an InputError or OSError on one of them stops all.

    Otherwise the others would wait for it at the beginning of the run, since pdsh does not stop them. The ranks meet
    at the port of the launcher, which is free again when the block has ended.

    Returns:
        a stack for what is entered among the checks and held during the run, such as a lock: the context of the run. It
        is closed here where there will be no run.

    Raises:
        InputError, OSError: this rank's own, or that a rank has not come.
        SystemExit: another rank has one, which it reports.
    """
    held = contextlib.ExitStack()
    try:
        if several_hosts():
            yield from _agreed(held)
        else:
            yield held
    except BaseException:
        held.close()
        raise


def _agreed(held: contextlib.ExitStack) -> Iterator[contextlib.ExitStack]:
    own: InputError | OSError | None = None
    try:
        yield held
    except (InputError, OSError) as error:
        own = error
    reasons = _exchange("ok" if own is None else "failed")
    if own is not None:
        raise own
    if "failed" in reasons:
        raise SystemExit(2)


def _exchange(value: str) -> list[str]:
    """Every rank's ``value``, before there is a process group, over plain sockets.

    Rank 0 stops listening before it answers: whoever has an answer finds the port free, or the process group's.
    """
    rank, world = rank_and_world()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return _receive_all(port, world, value) if rank == 0 else _tell(address, port, rank, value)
    except OSError as error:
        raise InputError(f"rank {rank} on {host()} cannot meet the others at {address}, port {port} ({error})"
                         ) from error


def _receive_all(port: int, world: int, value: str) -> list[str]:
    found, peers = {0: value}, []
    both = socket.has_dualstack_ipv6()
    end = time.monotonic() + _MEETING
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=world, dualstack_ipv6=both))
        while len(found) < world:
            server.settimeout(max(0.1, end - time.monotonic()))
            try:
                peer = stack.enter_context(server.accept()[0])
            except TimeoutError:
                absent = ", ".join(str(rank) for rank in range(world) if rank not in found)
                raise TimeoutError(f"rank {absent} has not come within {_MEETING:.0f} s") from None
            match = re.fullmatch(rb"lexmae ([0-9]{1,6}) (\w+)\n", _line(peer))
            if match and 0 < int(match[1]) < world:  # a stranger is not answered
                found[int(match[1])] = match[2].decode()
                peers.append(peer)
        server.close()
        values = [found[rank] for rank in range(world)]
        for peer in peers:
            peer.sendall(" ".join(values).encode() + b"\n")
        for peer in peers:  # who closes first keeps the port busy for a while: not this side
            with contextlib.suppress(OSError):
                peer.recv(1)
    return values


def _line(peer: socket.socket) -> bytes:
    peer.settimeout(10)
    try:
        return peer.makefile("rb").readline(100)
    except OSError:
        return b""


def _tell(address: str, port: int, rank: int, value: str) -> list[str]:
    end = time.monotonic() + _MEETING
    while True:
        with contextlib.ExitStack() as stack:
            try:
                peer = stack.enter_context(socket.create_connection((address, port), timeout=_MEETING))
                peer.sendall(f"lexmae {rank} {value}\n".encode())
                answer = stack.enter_context(peer.makefile("rb")).readline()
                if answer.endswith(b"\n"):
                    return answer.decode().split()
            except ConnectionError as error:  # rank 0 is not there yet
                if time.monotonic() > end:
                    raise TimeoutError(f"rank 0 has not come within {_MEETING:.0f} s") from error
        time.sleep(0.2)


class Hosts:
    """The hosts of a run and one folder: those that see it as rank 0 does, and those apart, with one of their own.

    Every method is a collective call. With one rank, or a shared folder, they cost next to nothing.

    Attributes:
        names: the host of every rank.
        sees: whether this rank sees rank 0's folder.
        apart: for each host apart, the rank that acts for it (its lowest).
        leads: whether this rank acts for a folder: rank 0, and the ranks of ``apart``.
    """

    def __init__(self, folder: str | Path):
        self.rank, world = rank_and_world()
        self.apart: list[int] = []
        self.names: list[str] = [host()]
        self.sees = True
        self._group: Any = None
        if world > 1:
            self._look(Path(folder), world)
        self.leads = self.rank == 0 or self.rank in self.apart

    def _look(self, folder: Path, world: int) -> None:
        import torch.distributed as dist

        self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        folder.mkdir(parents=True, exist_ok=True)
        mark = [f".shared-{os.getpid()}-{time.time_ns()}"]
        if self.rank == 0:
            (folder / mark[0]).touch()
        dist.broadcast_object_list(mark, src=0, group=self._group)
        seen: list[Any] = [None] * world
        self.sees, status = _appears(folder / mark[0]), folder.stat()
        dist.all_gather_object(seen, (host(), self.sees, (host(), status.st_dev, status.st_ino)), group=self._group)
        if self.rank == 0:
            (folder / mark[0]).unlink()
        self.names = [name for name, *_ in seen]
        found: dict[tuple, int] = {}
        for rank, (_, sees, folder_of) in enumerate(seen):
            if not sees:
                found.setdefault(folder_of, rank)
        self.apart = list(found.values())

    def collect(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Files that hosts apart wrote into ``folder`` come to rank 0's, and are removed there.

        Args:
            names: of the files this host gives, relative to the folder; all by default.
        """
        for rank in self.apart:
            files = _files(folder) if names is None else [name for name in names if (folder / name).is_file()]
            self._send(folder, files, rank, 0)
            if self.rank == rank:
                for name in files:
                    (folder / name).unlink()

    def hand_out(self, folder: Path, received: Path) -> Path:
        """Rank 0's ``folder`` with all its files, as ``received`` on the hosts apart; the path for this rank."""
        for rank in self.apart:
            if self.rank == rank:
                shutil.rmtree(received, ignore_errors=True)
            self._send(folder if self.rank == 0 else received, _files(folder) if self.rank == 0 else [], 0, rank)
        self.barrier()
        return folder if self.sees else received

    def refuse_difference(self, **values: Any) -> None:
        """Every host must say the same: its own copy of a recipe or of the data may be another.

        Args:
            values: what this rank has, by name. Ranks other than 0 may leave some out.

        Raises:
            InputError: on every rank, with the first name and host that differ from rank 0.
        """
        if len(self.names) == 1:
            return
        import torch.distributed as dist

        found: list[Any] = [None] * len(self.names)
        dist.all_gather_object(found, values, group=self._group)
        for rank, theirs in enumerate(found):
            for name, value in theirs.items():
                if value != found[0][name]:
                    raise InputError(f"{name} on {self.names[rank]} (rank {rank}) is {value!r}, on {self.names[0]} "
                                     f"{found[0][name]!r}: every host needs the same")

    def barrier(self) -> None:
        """Wait for all ranks."""
        if len(self.names) > 1:
            import torch.distributed as dist

            dist.barrier(group=self._group)

    def agree(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        if len(self.names) == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _send(self, folder: Path, files: list[str], source: int, target: int) -> None:
        import torch.distributed as dist

        box = [[(name, (folder / name).stat().st_size) for name in files] if self.rank == source else None]
        dist.broadcast_object_list(box, src=source, group=self._group)
        if self.rank not in (source, target):
            return
        for name, size in box[0] or ():
            if self.rank == source:
                _read_out(folder / name, size, target, self._group)
            else:
                with artifact.atomic_file(artifact.inside(folder, name), "wb") as out:
                    _write_in(out, size, source, self._group)


def _appears(path: Path) -> bool:
    end = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def _read_out(path: Path, size: int, target: int, group: Any) -> None:
    import torch
    import torch.distributed as dist

    with open(path, "rb") as source:
        left = size
        while left:
            block = bytearray(source.read(min(_CHUNK, left)))
            if not block:
                raise InputError("grew shorter while it was sent to another host", path)
            dist.send(torch.frombuffer(block, dtype=torch.uint8), target, group=group)
            left -= len(block)


def _write_in(out: Any, size: int, source: int, group: Any) -> None:
    import torch
    import torch.distributed as dist

    while size:
        block = torch.empty(min(_CHUNK, size), dtype=torch.uint8)
        dist.recv(block, source, group=group)
        out.write(block.numpy().tobytes())
        size -= len(block)
