"""A short campaign of faults: a few kills, full disks and damaged files of some commands (campaign.py has them all)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["--kills", "4", "--disks", "1", "--only", "prepare", "encode", "index --add", "search"],
    ["--kills", "0", "--disks", "0", "--corruptions", "4", "--only", "shards", "vectors", "dense", "index", "negatives",
     "model"]],
    ids=["commands", "artifacts"])
def test_everything_is_as_if_undisturbed(options):
    command = [sys.executable, "tests/faults/campaign.py", "--seed", "7", *options]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0 and "| all |" in done.stdout, done.stdout + done.stderr[-4000:]
