"""The commands from vectors to figures, run as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lexmae.data.corpus import write_qrels
from lexmae.errors import InputError
from lexmae.retrieval import fusion
from lexmae.retrieval.runs import read_run, write_run
from lexmae.retrieval.vectors import SparseVectors, quantise

TOOLS = Path(__file__).parents[1] / "tools"
VOCABULARY = [f"tok{i}" for i in range(12)]


def command(name, *arguments):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


@pytest.fixture
def work(tmp_path):
    """Document d<i> is about term i; the queries ask for terms 3 and 5, and one of them is a document itself."""
    dense = np.eye(12) * 2 + 0.1
    docs, queries = quantise(dense, 0), quantise(np.eye(12)[[3, 5]], 0)
    SparseVectors([f"d{i}" for i in range(12)], *docs, VOCABULARY, {"side": "docs"}).save(tmp_path / "docs")
    SparseVectors(["q3", "d5"], *queries, VOCABULARY, {"side": "queries"}).save(tmp_path / "q")
    write_qrels(tmp_path / "qrels.tsv", {"q3": {"d3": 1}, "d5": {"d0": 1}, "lost": {"d1": 1}})
    command("index", "--vectors", tmp_path / "docs", "--output", tmp_path / "i")
    return tmp_path


def test_search(work, capsys):
    command("search", "--index", work / "i", "--queries", work / "q", "--hits", 3, "--output", work / "r",
            "--json", work / "r.json", "--threads", 1)
    assert dict(read_run(work / "r")) == {"q3": [("d3", 21000), ("d0", 1000), ("d1", 1000)],
                                          "d5": [("d5", 21000), ("d0", 1000), ("d1", 1000)]}
    figures = json.loads((work / "r.json").read_text())
    assert figures["engine"] == "exact" and figures["queries_per_second"] > 0 and figures["without_results"] == 0
    assert "queries/s on 1 threads (exact)" in capsys.readouterr().err
    with pytest.raises(InputError, match="already exists"):
        command("search", "--index", work / "i", "--queries", work / "q", "--output", work / "r")


def test_search_leaves_out_the_query_itself(work):
    command("search", "--index", work / "i", "--queries", work / "q", "--hits", 3, "--output", work / "r",
            "--exclude-self")
    assert read_run(work / "r").documents("d5") == ["d0", "d1", "d10"]
    assert len(read_run(work / "r").documents("q3")) == 3


def test_index_is_changed_in_place(work, capsys):
    vectors = SparseVectors.open(work / "docs")
    SparseVectors(["new"], vectors.indptr[:2], vectors.indices[:12], vectors.weights[:12], VOCABULARY,
                  {"side": "docs"}).save(work / "more")
    (work / "ids").write_text("d3\nd0\n")
    command("index", "--index", work / "i", "--delete", work / "ids", "--add", work / "more")
    command("search", "--index", work / "i", "--queries", work / "q", "--hits", 2, "--output", work / "r")
    assert dict(read_run(work / "r")) == {"q3": [("d1", 1000), ("d10", 1000)], "d5": [("d5", 21000), ("d1", 1000)]}
    command("index", "--index", work / "i", "--compact")
    assert "11 documents of 12.0 terms each" in capsys.readouterr().err
    command("search", "--index", work / "i", "--queries", work / "q", "--hits", 2, "--output", work / "r2")
    assert (work / "r").read_bytes() == (work / "r2").read_bytes()
    for wrong in (["--index", work / "i"], ["--add", work / "more"],
                  ["--index", work / "i", "--compact", "--vectors", work / "docs"]):
        with pytest.raises(InputError, match="--index"):
            command("index", *wrong)


def test_search_on_a_device_that_is_not_there(work):
    with pytest.raises(InputError, match="abacus"):
        command("search", "--index", work / "i", "--queries", work / "q", "--output", work / "r", "--device", "abacus")
    with pytest.raises(InputError, match="cannot search on the device 'meta'"):
        command("search", "--index", work / "i", "--queries", work / "q", "--output", work / "r", "--device", "meta")


def test_search_with_documents_as_queries_is_refused(work):
    with pytest.raises(InputError, match="vectors of queries are needed"):
        command("search", "--index", work / "i", "--queries", work / "docs", "--output", work / "r")


def test_evaluate(work, capsys):
    command("search", "--index", work / "i", "--queries", work / "q", "--hits", 3, "--output", work / "r")
    write_run(work / "other", {"q3": [("d0", 2), ("d3", 1)], "unjudged": [("d0", 1)]})
    command("evaluate", "--run", work / "r", "--qrels", work / "qrels.tsv", "--compare", work / "other",
            "--json", work / "m.json", "--docs", work / "docs", "--queries", work / "q", "--per-query")
    printed = capsys.readouterr().out
    assert f"{work / 'r'}: 3 judged queries, 1 of them without results" in printed
    assert "2 of them without results; 1 queries of the run have no judgements and are left out" in printed
    figures = json.loads((work / "m.json").read_text())
    assert figures["means"]["MRR@10"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert figures["compare"]["means"]["MRR@10"] == pytest.approx(1 / 6)
    assert figures["per_query"]["lost"]["MRR@10"] == 0 and (figures["judged"], figures["without_results"]) == (3, 1)
    assert figures["sparsity"] == pytest.approx({"docs mean active": 12, "queries mean active": 1, "FLOPS": 1})
    lines = [line for line in printed.splitlines() if line.startswith(("MRR@10", "Recall@1000"))]
    assert len({len(line) for line in lines}) == 1  # columns are aligned


def test_evaluate_refuses_a_run_of_other_queries(work):
    write_run(work / "r", {"else": [("d0", 1)]})
    with pytest.raises(InputError, match="none of the queries"):
        command("evaluate", "--run", work / "r", "--qrels", work / "qrels.tsv")
    with pytest.raises(InputError, match="goes with --docs"):
        command("evaluate", "--run", work / "r", "--qrels", work / "qrels.tsv", "--queries", work / "q")


def test_export(work, capsys):
    command("export", "--vectors", work / "docs", "--format", "anserini", "--output", work / "x", "--file-size", 5)
    assert len(list((work / "x").glob("docs-*.jsonl"))) == 3
    assert "12 docs in docs-00000.jsonl" in capsys.readouterr().err


def test_errors_are_one_line_and_exit_code_2(work):
    (work / "bad").write_text("q Q0 d 1 high t\n")
    done = subprocess.run([sys.executable, TOOLS / "evaluate.py", "--run", work / "bad", "--qrels", work / "qrels.tsv"],
                          capture_output=True, text=True, cwd=TOOLS.parent, env={"PYTHONPATH": str(TOOLS.parent)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {work / 'bad'}:1: the score 'high' is not a finite number\n"


@pytest.mark.parametrize("name", ["search", "evaluate", "export", "mine"])
def test_help_shows_defaults(name, capsys):
    with pytest.raises(SystemExit) as stop:
        command(name, "--help")
    assert stop.value.code == 0 and "(default: " in capsys.readouterr().out


def test_dense_vectors_from_encoding_to_a_hybrid_run(model_dir, shards_dir, beir_dir, tmp_path, capsys):
    pytest.importorskip("faiss", reason="needs faiss-cpu or faiss-gpu")
    for kind in ("lexicon", "cls"):
        for side in (["docs"], ["queries", "--split", "dev"]):
            command("encode", "--model", model_dir, "--data", shards_dir, "--side", *side, "--representation", kind,
                    "--output", tmp_path / f"{kind}-{side[0]}")
        command("index", "--vectors", tmp_path / f"{kind}-docs", "--output", tmp_path / f"{kind}-index", "--engine",
                "exact" if kind == "lexicon" else "faiss")
        command("search", "--index", tmp_path / f"{kind}-index", "--queries", tmp_path / f"{kind}-queries", "--hits", 9,
                "--output", tmp_path / kind, "--json", tmp_path / f"{kind}.json")
    assert "16 dimensions" in capsys.readouterr().err
    command("search", "--fuse", tmp_path / "lexicon", tmp_path / "cls", "--fusion", "min-max", "--weights", 1, 0.5,
            "--hits", 5, "--output", tmp_path / "hybrid", "--json", tmp_path / "hybrid.json")
    hybrid, parts = read_run(tmp_path / "hybrid"), [read_run(tmp_path / kind) for kind in ("lexicon", "cls")]
    assert dict(hybrid) == dict(fusion.fuse(parts, "min-max", weights=[1, 0.5], hits=5))
    assert json.loads((tmp_path / "hybrid.json").read_text())["fusion"] == "min-max"
    command("evaluate", "--run", tmp_path / "lexicon", tmp_path / "hybrid", "--qrels", beir_dir, "--split", "dev")
    with pytest.raises(InputError, match="holds dense vectors, which the engine exact"):
        command("search", "--index", tmp_path / "lexicon-index", "--queries", tmp_path / "cls-queries", "--output",
                tmp_path / "no")
    with pytest.raises(InputError, match="--top-k is for sparse"):
        command("search", "--index", tmp_path / "cls-index", "--queries", tmp_path / "cls-queries", "--output",
                tmp_path / "no", "--top-k", 3)


def test_search_options_that_contradict_each_other(work):
    for arguments, reason in [(["--fuse", "a", "b", "--index", "i"], "takes the place of"), ([], "or --fuse with runs"),
                              (["--index", "i", "--queries", "q", "--weights", 1], "--weights go with --fuse"),
                              (["--index", "i", "--queries", "q", "--rrf-k", 9], "--rrf-k and --weights go with"),
                              (["--fuse", "a", "b", "--max-passage"], "--effort and --top-k go with --index"),
                              (["--fuse", "a", "b", "--top-k", 4], "--effort and --top-k go with --index"),
                              (["--index", work / "i", "--queries", work / "q", "--effort", 2], "exact is exact")]:
        with pytest.raises(InputError, match=reason):
            command("search", *arguments, "--output", work / "none")
    with pytest.raises(InputError, match="--faiss-kind goes with"):
        command("index", "--vectors", work / "docs", "--output", work / "j", "--faiss-kind", "flat")
    with pytest.raises(InputError, match="--engine and --overwrite go with --output"):
        command("index", "--index", work / "i", "--compact", "--overwrite")
    with pytest.raises(InputError, match="--output and --overwrite go with --sweep"):
        command("evaluate", "--run", "r", "--qrels", "q", "--output", work / "none")
    with pytest.raises(InputError, match="--split goes with --side queries"):
        command("encode", "--model", "m", "--data", "d", "--side", "docs", "--split", "dev", "--output", work / "none")
