"""Files with a checksum beside them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from lexmae import sidecar, verification
from lexmae.data.negatives import Row, read_negatives, write_negatives
from lexmae.errors import InputError

ROWS = [Row("q1", ["d1", "d2"], [0.5, -1.0], {"d3": 2.0}), Row("q2", ["ä"])]


@pytest.fixture
def negatives(tmp_path):
    write_negatives(tmp_path / "n.jsonl", ROWS)
    return tmp_path / "n.jsonl"


def test_sha256sum_agrees(negatives):
    assert list(read_negatives(negatives)) == ROWS
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "n.jsonl.sha256"], cwd=negatives.parent, check=True, capture_output=True)


@pytest.mark.parametrize("at", [3, 20, -2])
def test_a_changed_file_is_refused(negatives, monkeypatch, at):
    data = bytearray(negatives.read_bytes())
    data[at] ^= 1
    negatives.write_bytes(data)
    with pytest.raises(InputError, match=r"n\.jsonl.*does not have the checksum that n.jsonl.sha256 gives"):
        list(read_negatives(negatives))
    monkeypatch.setenv(verification.VARIABLE, "off")
    sidecar.verify(negatives)
    monkeypatch.setenv(verification.VARIABLE, "full")
    sidecar.checksum_path(negatives).unlink()
    sidecar.verify(negatives)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"abc  n.jsonl\n", b"0" * 64 + b"  other.jsonl\n",
                                  b"0" * 64 + b"  n.jsonl\n" + b"0" * 64 + b"  m.jsonl\n"])
def test_a_checksum_that_is_none_is_refused(negatives, text):
    sidecar.checksum_path(negatives).write_bytes(text)
    with pytest.raises(InputError, match=r"n\.jsonl\.sha256.*is not the checksum of n\.jsonl"):
        list(read_negatives(negatives))


def test_written_again_it_has_its_own_checksum(negatives):
    write_negatives(negatives, ROWS[:1])
    assert list(read_negatives(negatives)) == ROWS[:1]


def test_a_failed_write_leaves_both_as_they_were(negatives):
    def rows():
        yield ROWS[1]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_negatives(negatives, rows())
    assert list(read_negatives(negatives)) == ROWS
    assert sorted(path.name for path in negatives.parent.iterdir()) == ["n.jsonl", "n.jsonl.sha256"]


def test_killed_in_between_it_has_no_checksum(negatives, monkeypatch):
    """The new file under the old one's checksum would be refused."""
    def killed(path, mode="w", real=sidecar.artifact.atomic_file):
        if mode == "w":
            raise KeyboardInterrupt
        return real(path, mode)

    monkeypatch.setattr(sidecar.artifact, "atomic_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write_negatives(negatives, ROWS[1:])
    assert list(read_negatives(negatives)) == ROWS[1:]
