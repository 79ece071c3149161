"""Vectors that are wrong: each command says what and where in one line and exits with 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lexmae import verification
from lexmae.errors import InputError
from lexmae.retrieval import vectors
from lexmae.retrieval.dense import MATRIX, DenseVectors
from lexmae.retrieval.vectors import SparseVectors, part_name

ROOT = Path(__file__).parents[1]
PART = part_name(0, 0)


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    """What readers find by themselves: without the check of sizes and checksums that comes before."""
    monkeypatch.setenv(verification.VARIABLE, "off")


@pytest.fixture
def made(tmp_path) -> Path:
    """Vectors a, b and c over five terms."""
    SparseVectors(["a", "b", "c"], np.array([0, 2, 3, 5]), np.array([0, 1, 2, 3, 4], np.int32),
                  np.array([5, 4, 3, 2, 1], np.uint16), [f"t{i}" for i in range(5)], {"side": "docs"}
                  ).save(tmp_path / "v")
    return tmp_path / "v"


def rewrite(folder: Path, terms=((0, 1), (2,), (3, 4)), weights=((5, 4), (3,), (2, 1)), term_type=None,
            weight_type=None, names=("id", "terms", "weights")) -> None:
    """The part as another program may write it."""
    columns = [pa.array(["a", "b", "c"], pa.large_string()), pa.array(terms, pa.large_list(term_type or pa.int32())),
               pa.array(weights, pa.large_list(weight_type or pa.uint16()))]
    table = pa.table(dict(zip(names, columns, strict=True)))
    with pa.OSFile(str(folder / PART), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)


def misname(folder: Path) -> None:
    """Columns of other types, and one whose name is not UTF-8."""
    rewrite(folder, weight_type=pa.float32())
    (folder / PART).write_bytes((folder / PART).read_bytes().replace(b"weights", b"\x8eeights"))


def edit_manifest(folder: Path, **changes) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(record | changes))


DAMAGE = {
    "nan": (lambda v: rewrite(v, weights=((5, 4), (float("nan"),), (2, 1)), weight_type=pa.float32()),
            "a weight of 'b' is not a finite number (nan)"),
    "names that are not UTF-8": (lambda v: misname(v), "'utf-8' codec can't decode byte 0x8e"),
    "infinite": (lambda v: rewrite(v, weights=((5, 4), (3,), (2, float("inf"))), weight_type=pa.float64()),
                 "a weight of 'c' is not a finite number (inf)"),
    "negative": (lambda v: rewrite(v, weights=((5, -4), (3,), (2, 1)), weight_type=pa.int16()),
                 "a weight of 'a' is negative (-4)"),
    "floats": (lambda v: rewrite(v, weights=((5, 4), (3,), (2, 0.5)), weight_type=pa.float32()),
               "its column weights is of type large_list<item: float>"),
    "out of vocabulary": (lambda v: rewrite(v, terms=((0, 1), (2,), (3, 5))), "'c' has the term 5, but the vocabulary "
                                                                              "has 5 entries (0 to 4)"),
    "negative term": (lambda v: rewrite(v, terms=((0, 1), (-2,), (3, 4))), "'b' has the term -2"),
    "wide terms": (lambda v: rewrite(v, term_type=pa.int64()), "its column terms is of type large_list<item: int64>"),
    "lengths": (lambda v: rewrite(v, weights=((5, 4), (3,), (2,))), "5 terms and 4 weights do not belong together"),
    "columns": (lambda v: rewrite(v, names=("id", "indices", "weights")), "has the columns id, indices, weights"),
    "truncated": (lambda v: (v / PART).write_bytes((v / PART).read_bytes()[:-30]), "not an Arrow file, or a damaged"),
    "half": (lambda v: (v / PART).write_bytes((v / PART).read_bytes()[:300]), "not an Arrow file, or a damaged one"),
    "empty": (lambda v: (v / PART).write_bytes(b""), "not an Arrow file, or a damaged one"),
    "no part": (lambda v: (v / PART).unlink(), "holds no part-*.arrow"),
    "no vocabulary": (lambda v: (v / vectors.VOCABULARY).unlink(), "is missing"),
    "manifest": (lambda v: (v / "manifest.json").write_text("{"), "not a manifest"),
    "no manifest": (lambda v: (v / "manifest.json").unlink(), "has no manifest.json: not a finished"),
    "kind": (lambda v: edit_manifest(v, kind="shards"), "is of kind 'shards', but 'vectors' is needed here"),
    "format": (lambda v: edit_manifest(v, format=9), "has format 9, this version reads format 1"),
    "side": (lambda v: edit_manifest(v, extra={"side": "queries"}), "vectors of queries, but vectors of docs"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_is_said(made, name):
    damage, reason = DAMAGE[name]
    damage(made)
    with pytest.raises(InputError) as error:
        SparseVectors.open(made, side="docs")
    assert reason in str(error.value) and "\n" not in str(error.value)


def run(*command) -> str:
    """The one line of a command that exits with 2."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stdout == "", done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nan", "negative", "out of vocabulary", "kind", "truncated"])
def test_commands_say_it_in_one_line(made, name):
    damage, reason = DAMAGE[name]
    damage(made)
    output = made.parent / "out"
    assert reason in run("tools/index.py", "--vectors", made, "--output", output)
    assert reason in run("tools/export.py", "--vectors", made, "--format", "csr", "--output", output)
    assert not output.exists()


@pytest.mark.slow
def test_commands_say_what_is_wrong_with_dense_vectors_and_queries(made, tmp_path):
    pytest.importorskip("faiss", reason="needs faiss-cpu or faiss-gpu")
    DenseVectors(["a", "b"], np.array([[1, 2], [3, np.nan]], np.float32), {"side": "docs"}).save(tmp_path / "d")
    assert "the vector of 'b' holds a value that is not a finite number" in run(
        "tools/index.py", "--vectors", tmp_path / "d", "--engine", "faiss", "--output", tmp_path / "out")
    (tmp_path / "d" / MATRIX).write_bytes((tmp_path / "d" / MATRIX).read_bytes()[:-3])
    assert "is not as long as an array of (2, 2) should be" in run(
        "tools/index.py", "--vectors", tmp_path / "d", "--engine", "faiss", "--output", tmp_path / "out")
    subprocess.run([sys.executable, "tools/index.py", "--vectors", made, "--output", tmp_path / "i"], check=True,
                   cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert "vectors of queries are needed here" in run("tools/search.py", "--index", tmp_path / "i", "--queries", made,
                                                       "--output", tmp_path / "r")
    edit_manifest(made, extra={"side": "queries"})
    rewrite(made, terms=((0, 1), (2,), (3, 77)))
    assert "'c' has the term 77" in run("tools/search.py", "--index", tmp_path / "i", "--queries", made, "--output",
                                        tmp_path / "r")
    assert not (tmp_path / "r").exists() and not (tmp_path / "out").exists()
