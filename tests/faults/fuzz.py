"""A coverage-guided fuzzer over the readers of tests/hostile.py: hours where the tests take seconds.

    pip install --target FOLDER atheris
    PYTHONPATH=FOLDER python tests/faults/fuzz.py --seconds 60                  every reader, one after the other
    PYTHONPATH=FOLDER python tests/faults/fuzz.py --seconds 600 negatives run   those whose name begins so

A reader passes when every execution ends with a result or an InputError, within 10 seconds and 2 GB. A finding is kept
in --findings as the bytes that cause it, and its traceback is printed. Exit code 1 where there is one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
_PACKAGES = ["lexmae", "yaml", "json"]
_COMPILED = [f"lexmae.retrieval.{name}" for name in ("exact", "kernels", "segments")]  # numba reads their bytecode


def fuzz_one(name: str, seconds: int, findings: Path) -> None:
    """Fuzz one reader in this process; it ends with the exit code of libFuzzer."""
    import atheris

    with atheris.instrument_imports(include=_PACKAGES, exclude=_COMPILED, enable_loader_override=False):
        import hostile

        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        target, = hostile.targets(folder / "inputs", name)
    seeds = folder / "seeds"
    seeds.mkdir()
    for i, seed in enumerate(target.seeds):
        (seeds / str(i)).write_bytes(seed)
        target.run(seed)
    atheris.Setup([sys.argv[0], str(seeds), f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048",
                   "-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={findings}/{name.replace('/', '-')}-",
                   f"-max_len={max(4096, 2 * max(map(len, target.seeds)))}"], target.run_quietly)
    atheris.Fuzz()


def run(name: str, seconds: int, findings: Path) -> dict:
    """Fuzz one reader in a process of its own, and report it."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, __file__, "--one", name, "--seconds", str(seconds), "--findings",
                           str(findings)], capture_output=True, text=True, errors="replace")
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr + done.stdout)
    if done.returncode:
        print((done.stdout + done.stderr)[-3000:])
    return {"reader": name, "seconds": round(time.monotonic() - start),
            "executions": int(executed[1]) if executed else 0, "findings": int(done.returncode != 0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", help="beginnings of names; all by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder for what breaks a reader")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.findings.mkdir(parents=True, exist_ok=True)
    if options.one:
        fuzz_one(options.one, options.seconds, options.findings)
    import hostile

    with tempfile.TemporaryDirectory() as folder:
        names = [target.name for target in hostile.targets(Path(folder) / "inputs")]
    rows = []
    for name in names:
        if not options.readers or name.startswith(tuple(options.readers)):
            rows.append(run(name, options.seconds, options.findings))
            print("| {reader} | {seconds} | {executions} | {findings} |".format(**rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(row["findings"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
