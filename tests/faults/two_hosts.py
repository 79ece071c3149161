"""Two hosts on one machine: namespaces with a network, mounts and a name of their own.

Each host is a process that sleeps in namespaces of its own (``unshare``); a pair of virtual network cards joins the
two. Nothing outside them is changed, and all of it disappears with their processes. An sshd runs in each, and
DeepSpeed's launcher reaches it through pdsh and an ``ssh`` that is first on the path and knows keys and addresses.

Without root the same works inside ``unshare -Ur -n -m -p -f --mount-proc COMMAND``: there sshd cannot give up its
privileges, so that ``ssh`` enters the other host's namespaces directly.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

NAMES = {"host-a": "10.231.77.1", "host-b": "10.231.77.2"}
_PORT = 22
_ENTER = "--net --mount --uts"
_SSHD = """Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
"""
_SSH = """Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 5
  ServerAliveInterval 5
  ServerAliveCountMax 3
"""
_SSHD_WRAPPER = '#!/bin/sh\nexec {ssh} -F {folder}/ssh_config "$@"\n'
_ENTERING_WRAPPER = """#!/bin/bash
# ssh for hosts that are entered: options are passed over, the rest is a host and a command for its shell
while [[ "$1" == -* ]]; do case "$1" in -o|-p|-i|-F|-l) shift 2;; *) shift;; esac; done
host="$1"; shift
exec nsenter -t "$(cat {folder}/pid-"$host")" {enter} -- sh -c "cd; $*"
"""


def missing() -> str | None:
    """Why two hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "two hosts need root (or: unshare -Ur -n -m -p -f --mount-proc COMMAND)"
    tools = ["ip", "pdsh", "unshare", "nsenter", "mount", *([] if _one_user() else ["ssh", "ssh-keygen", "sshd"])]
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    for tool in tools:
        if shutil.which(tool, path=path) is None:
            return f"two hosts need {tool} (Debian: iproute2, openssh-server, pdsh)"
    done = subprocess.run(["unshare", *_ENTER.split(), "true"], capture_output=True, text=True)
    if done.returncode:
        return f"no namespaces: {done.stderr.strip()}"
    return None


def _one_user() -> bool:
    """Whether this is a namespace of one user, where sshd does not work."""
    return Path("/proc/self/uid_map").read_text(encoding="ascii").split()[2] == "1"


class Host:
    """One of them; ``pid`` is its first process."""

    def __init__(self, name: str, folder: Path):
        self.name, self.address = name, NAMES[name]
        script = f"hostname {name} && touch {folder}/up-{name} && exec sleep 3600"
        self._holder = subprocess.Popen(["unshare", *_ENTER.split(), "sh", "-c", script])
        _wait(lambda: (folder / f"up-{name}").exists(), f"{name} does not start")
        self.pid = self._holder.pid
        self._network = os.readlink(f"/proc/{self.pid}/ns/net")
        (folder / f"pid-{name}").write_text(str(self.pid), encoding="ascii")

    def inside(self, *command: str) -> list[str]:
        """The command that runs ``command`` on this host."""
        return ["nsenter", "-t", str(self.pid), *_ENTER.split(), "--", "env", "-C", str(ROOT), *command]

    def run(self, *command: str) -> str:
        """Run it and return what it prints; fails where it fails."""
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{self.name}: {command}: {done.stderr}"
        return done.stdout

    def mount(self, source: Path, target: Path) -> None:
        """Show this host another folder under the name ``target``."""
        self.run("mount", "--bind", str(source), str(target))

    def kill(self) -> None:
        """The cable is cut and all processes of this host die, so that it says no goodbye."""
        if self.processes():
            subprocess.run(self.inside("ip", "link", "set", "eth0", "down"), capture_output=True)
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._holder.poll()
            time.sleep(0.02)
        self._holder.wait()

    def processes(self) -> dict[int, str]:
        """The running processes of this host: number → command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(folder / "ns" / "net") == self._network and int(folder.name) != os.getpid():
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if line:  # one that has ended and waits for its parent has none
                        found[int(folder.name)] = line
        return found


class TwoHosts:
    """The two hosts, and the launcher that starts commands on both.

    Attributes:
        hostfile: of DeepSpeed, one slot on each.
        environment: to start commands with.
    """

    def __init__(self, folder: Path):
        self.folder, self.hostfile, self.hosts = folder, folder / "hostfile", []
        (folder / "bin").mkdir()
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES), encoding="utf-8")
        env_file = folder / "deepspeed_env"
        env_file.write_text("GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n"
                            "CUDA_VISIBLE_DEVICES=\nLEXMAE_LIFELINE=12\n", encoding="utf-8")
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
                            "DS_ENV_FILE": str(env_file),
                            "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"}

    def build(self) -> None:
        """Make hosts, network and ssh."""
        self.hosts = [Host(name, self.folder) for name in NAMES]
        a, b = self.hosts
        subprocess.run(["ip", "link", "add", "eth0", "netns", str(a.pid), "type", "veth", "peer", "name", "eth0",
                        "netns", str(b.pid)], check=True)
        table = self.folder / "hosts"
        table.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in NAMES.items()),
                         encoding="ascii")
        for host in self.hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            for card in ("lo", "eth0"):
                host.run("ip", "link", "set", card, "up")
            host.mount(table, Path("/etc/hosts"))
        self._wrapper(_ENTERING_WRAPPER) if _one_user() else self._start_sshd()

    def _wrapper(self, text: str) -> None:
        ssh = self.folder / "bin" / "ssh"
        ssh.write_text(text.format(folder=self.folder, ssh=shutil.which("ssh"), enter=_ENTER), encoding="utf-8")
        ssh.chmod(0o755)

    def _start_sshd(self) -> None:
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)], check=True)
        (self.folder / "ssh_config").write_text(_SSH.format(folder=self.folder), encoding="utf-8")
        self._wrapper(_SSHD_WRAPPER)
        for host in self.hosts:
            host.run("mount", "-t", "tmpfs", "none", "/run")
            host.run("mkdir", "-p", "/run/sshd")
            config = self.folder / f"sshd-{host.name}"
            config.write_text(_SSHD.format(port=_PORT, address=host.address, folder=self.folder), encoding="utf-8")
            host.run("/usr/sbin/sshd", "-f", str(config), "-E", f"{config}.log")

    def start(self, *command: str) -> subprocess.Popen:
        """Start a command on the first host, output to ``output.txt``."""
        with open(self.folder / "output.txt", "w", encoding="utf-8") as out:
            return subprocess.Popen(self.hosts[0].inside(*command), cwd=ROOT, env=self.environment, stdout=out,
                                    stderr=subprocess.STDOUT, start_new_session=True)

    def launch(self, *command: str, master_port: int = 29517) -> subprocess.Popen:
        """Start a script on both hosts through DeepSpeed's launcher."""
        return self.start(str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(self.hostfile),
                          "--master_port", str(master_port), *command)

    def output(self) -> str:
        """What the last command has printed."""
        return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")

    def finish(self, process: subprocess.Popen, code: int | None = 0, timeout: float = 120) -> str:
        """Wait for a command and return what it printed; fails where its exit code is not ``code`` (None: not 0)."""
        try:
            found = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s\n{self.output()[-4000:]}") from None
        good = found != 0 if code is None else found == code
        assert good, f"exit code {found}\n{self.output()[-4000:]}"
        return self.output()

    def cut(self) -> None:
        """The cable between the two is cut."""
        self.hosts[1].run("ip", "link", "set", "eth0", "down")

    def mend(self) -> None:
        """It is mended."""
        self.hosts[1].run("ip", "link", "set", "eth0", "up")

    def kill(self) -> None:
        """Both hosts die."""
        for host in self.hosts:
            host.kill()


def _wait(condition, failure: str, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, failure
        time.sleep(0.05)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Two hosts that share every folder until one mounts another; they end with the block."""
    made = TwoHosts(folder)
    try:
        made.build()
        yield made
    finally:
        made.kill()


def main(command: Sequence[str]) -> int:
    """``python tests/faults/two_hosts.py SCRIPT ARGUMENTS…`` runs a script of the project on both hosts."""
    import tempfile

    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, two_hosts(Path(folder)) as made:
        print(f"+ deepspeed --hostfile {made.hostfile} {shlex.join(command)}", file=sys.stderr)
        process = made.launch(*command)
        code = process.wait()
        print(made.output())
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
