"""Faults in numbers: kill -9, damaged files, a full disk, a read-only output. Afterwards all is as if undisturbed.

    python tests/faults/campaign.py --seed 1 --kills 20 --corruptions 40        every command; prints Markdown tables
    python tests/faults/campaign.py --only prepare "index --add" shards --kills 100

`--kills` and `--corruptions` are numbers for each command and for each kind of artifact. Full disks and read-only
outputs are a tmpfs, which needs root. Exit code 1 where anything was not as it must be; each case is said on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import commands
from commands import Command, Outcome, run

from lexmae import artifact, verification
from lexmae.errors import InputError

ROOM = 512  # MB of the tmpfs where the disk is not full
KILLED = (-signal.SIGKILL, -signal.SIGALRM)  # exit codes
PAGE = os.sysconf("SC_PAGESIZE")  # bytes that it gives at a time


class Campaign:
    """Faults on one set of inputs.

    Attributes:
        folder: of the inputs; scratch: of what is made and damaged.
        failures: what was not as it must be.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.scratch, self.random = folder / "inputs", folder / "scratch", random.Random(seed)
        self.failures: list[str] = []
        for path in (self.folder, self.scratch):
            path.mkdir()
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # what is verified here is of no use to the user
        commands.load()
        made = run(lambda: commands.inputs(self.folder), self.scratch)
        if made.code:
            raise SystemExit(f"no inputs:\n{made.text}")

    def fail(self, counts: Counter, what: str, outcome: Outcome | None = None) -> None:
        """Note a case, and say it."""
        counts["failures"] += 1
        end = "" if outcome is None else f" (exit code {outcome.code})\n{outcome.text[-1500:]}"
        self.failures.append(what)
        print(f"FAILURE {what}{end}", file=sys.stderr, flush=True)

    def start(self, command: Command, output: Path) -> None:
        """The output as it is before the command: absent, or what the command changes."""
        for old in [output, *output.parent.glob(f"{output.name}.*"), *output.parent.glob(f".{output.name}.*")]:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        command.before(output)

    def undisturbed(self, command: Command, output: Path) -> str:
        """Run it to the end, note what it takes, and return the digest that all others must have."""
        for _ in range(2):  # the first compiles
            self.start(command, output)
            command.states = {command.state(output)}
            done = run(lambda: command.job(output), self.scratch)
            if done.code:
                raise SystemExit(f"{command.name} fails undisturbed:\n{done.text}")
        command.seconds, command.operations = done.seconds, done.operations
        return command.digest(output)

    def finish(self, command: Command, output: Path, expected: str, counts: Counter, what: str) -> None:
        """The same command once more, which must end well and with the same result."""
        done = run(lambda: command.job(output), self.scratch)
        try:
            same = done.code == 0 and command.digest(output) == expected
        except (InputError, OSError, ValueError) as error:
            same, done.text = False, done.text + str(error)
        if not same:
            self.fail(counts, f"{command.name}: {what}; then not as undisturbed", done)
        elif artifact.partial_path(output).exists():
            self.fail(counts, f"{command.name}: {what}; an unfinished output is left")

    # --------------------------------------------------------------------------------------------------------- kills

    def kill(self, command: Command, kills: int) -> Counter:
        """Kill a command so often; up to three times before it may finish."""
        counts, output = Counter(), self.scratch / "output"
        expected = self.undisturbed(command, output)
        while counts["kills"] < kills and not counts["failures"] > 5:
            self.start(command, output)
            told, state = [], None
            for _ in range(min(self.random.randint(1, 3), kills - counts["kills"])):
                how = self._blow(command)
                told.append(str(how))
                done = run(lambda: command.job(output), self.scratch, **how)
                counts["kills"] += done.code in KILLED
                if done.code not in (0, *KILLED):
                    self.fail(counts, f"{command.name} after {told}", done)
                try:
                    state = command.state(output)
                except (InputError, OSError, ValueError) as error:
                    self.fail(counts, f"{command.name} after {told}: {error}")
                    break
                if state not in {*command.states, expected}:
                    self.fail(counts, f"{command.name} after {told}: a result that is neither old nor new")
                if state == expected:
                    break
            if state != expected:
                self.finish(command, output, expected, counts, f"killed {told}")
        return counts

    def _blow(self, command: Command) -> dict:
        choice = self.random.random()
        if choice < 0.6:
            delay = 0.0 if choice < 0.3 else self.random.expovariate(2000)  # seconds, 0.5 ms in the mean
            return {"crash_at": self.random.randint(1, command.operations), "delay": delay}
        return {"kill_after": self.random.uniform(0.02, 0.98) * command.seconds}

    # --------------------------------------------------------------------------------------------------------- disks

    def disks(self, command: Command, rounds: int) -> Counter:
        """Fill the disk of the output so often, and make it read-only once."""
        counts, place = Counter(), self.scratch / "small"
        output = place / "output"
        with mounted(place):
            free = lambda: os.statvfs(place).f_bavail * os.statvfs(place).f_frsize  # noqa: E731
            (place / "filler").write_bytes(bytes(2 * PAGE))  # a tmpfs of size 0 has no limit
            self.start(command, output)
            before = free()
            expected = self.undisturbed(command, output)
            pages = max(1, (before - free()) // PAGE)
            for number in range(rounds):
                self.start(command, output)
                used = ROOM * 2**20 - free()
                remount(place, f"size={used + self.random.randrange(pages) * PAGE}")
                done = run(lambda: command.job(output), self.scratch)
                remount(place, f"size={ROOM}m")
                if done.code == 0:
                    continue  # it had room enough after all
                counts["full"] += 1
                self._said(command, done, counts, f"disk full, round {number}", output, expected)
            self.start(command, output)
            remount(place, "ro")
            done = run(lambda: command.job(output), self.scratch)
            remount(place, "rw")
            counts["read-only"] += 1
            self._said(command, done, counts, "read-only", output, expected)
        return counts

    def _said(self, command: Command, done: Outcome, counts: Counter, what: str, output: Path, expected: str) -> None:
        """It must have failed, said why in one line, left nothing half, and must finish with room."""
        try:
            if command.state(output) not in command.states:
                self.fail(counts, f"{command.name}: {what}; a result that is not whole", done)
        except (InputError, OSError, ValueError) as error:
            self.fail(counts, f"{command.name}: {what}; {error}", done)
        if done.code not in (1, 2) or not done.text.splitlines()[-1].startswith("error: ") or "Traceback" in done.text:
            counts["not said in one line"] += 1
            print(f"{command.name}: {what}: exit code {done.code}: {done.text[-300:]}", file=sys.stderr)
        self.finish(command, output, expected, counts, what)

    # --------------------------------------------------------------------------------------------------- corruptions

    def corrupt(self, kind: str, source: Path, job: Callable[[Path, Path], str], rounds: int) -> Counter:
        """Damage copies of an artifact; ``full`` must name the file, and ``fast`` refuse it on this first use."""
        counts, damaged, output = Counter(), self.scratch / "damaged" / source.name, self.scratch / "read"
        good = self._read(job, source, output, "off")
        if good.code:
            raise SystemExit(f"{kind} cannot be read undamaged:\n{good.text}")
        expected = result(output)
        while counts["corruptions"] < rounds:
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(source, damaged)
            file, how = self._damage(damaged)
            if kind == "model" and file.name == artifact.MANIFEST and how == "deleted":
                continue  # which makes it a model of others, without checksums
            counts["corruptions"] += 1
            counts[how.split()[0]] += 1
            told = f"{kind}: {file.relative_to(damaged)} {how}"
            seen = self._read(job, damaged, output, "full")
            last = (seen.text.splitlines() or [""])[-1]
            named = str(damaged) if file.name == artifact.MANIFEST else str(file)
            if seen.code != 2 or not last.startswith(f"error: {named}"):
                self.fail(counts, f"{told}: not named with --verify full", seen)
            else:
                counts["named"] += 1
            seen = self._read(job, damaged, output, "fast")
            how = {0: "same" if seen.code == 0 and result(output) == expected else "other", 2: "refused"}
            counts[f"fast {how.get(seen.code, 'error')}"] += 1
            if seen.code != 2:
                self.fail(counts, f"{told}: not refused on first use", seen)
        return counts

    def _read(self, job: Callable[[Path, Path], object], source: Path, output: Path, level: str) -> Outcome:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()

        def child() -> None:
            os.environ[verification.VARIABLE] = level
            job(source, output / "made")

        return run(child, self.scratch)

    def _damage(self, folder: Path) -> tuple[Path, str]:
        file = self.random.choice([path for path in sorted(folder.rglob("*")) if path.is_file()
                                   and path.stat().st_size])
        how, data = self.random.choice(["truncated", "flipped", "deleted"]), bytearray(file.read_bytes())
        at = self.random.randrange(len(data))
        if how == "deleted":
            file.unlink()
            return file, how
        if how == "truncated":
            del data[at:]
        else:
            data[at] ^= 1 << self.random.randrange(8)
        file.write_bytes(data)
        return file, f"{how} at {at}"


def result(output: Path) -> list[str]:
    """The checksums of what a reader wrote."""
    names = (path for path in sorted(output.rglob("*")) if path.is_file() and path.name != artifact.MANIFEST)
    return [f"{path.name} {artifact.checksum(path)}" for path in names]


@contextlib.contextmanager
def mounted(place: Path) -> Iterator[None]:
    """A tmpfs at ``place``."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}m", "none", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def remount(place: Path, options: str) -> None:
    """Change the size of the tmpfs, or whether it can be written."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with mounted(Path(folder) / "x"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def table(title: str, columns: list[str], rows: dict[str, Counter]) -> str:
    """A Markdown table with a line for each row and one for all."""
    total = sum(rows.values(), Counter())
    lines = [f"| {title} | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    return "\n".join(lines + [f"| {name} | {' | '.join(str(counts[column]) for column in columns)} |"
                              for name, counts in [*rows.items(), ("all", total)]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20, help="for each command")
    parser.add_argument("--disks", type=int, default=3, help="full disks for each command")
    parser.add_argument("--corruptions", type=int, default=40, help="for each kind of artifact")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of commands and of kinds of artifacts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        campaign, faults, damage = Campaign(Path(folder), options.seed), {}, {}
        disks = options.disks and can_mount()
        for command in commands.commands(campaign.folder):
            if options.only and command.name not in options.only:
                continue
            faults[command.name] = campaign.kill(command, options.kills)
            if disks:
                faults[command.name] += campaign.disks(command, options.disks)
            print(f"{command.name}: {dict(faults[command.name])}", file=sys.stderr, flush=True)
        for kind, source, job in commands.readers(campaign.folder):
            if options.corruptions and (not options.only or kind in options.only):
                damage[kind] = campaign.corrupt(kind, source, job, options.corruptions)
                print(f"{kind}: {dict(damage[kind])}", file=sys.stderr, flush=True)
        if faults:
            print(table("command", ["kills", "full", "read-only", "not said in one line", "failures"], faults), "\n")
        if damage:
            print(table("artifact", ["corruptions", "truncated", "flipped", "deleted", "named", "fast refused",
                                     "fast same", "fast other", "fast error", "failures"], damage))
        return int(bool(campaign.failures))


if __name__ == "__main__":
    sys.exit(main())
