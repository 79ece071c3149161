"""Judgements of folders, several runs and several collections, through the command."""

from __future__ import annotations

import json

import pytest
import scipy.stats
from test_search_tools import command

from lexmae.data.corpus import Passage, Query, write_beir, write_qrels
from lexmae.errors import InputError
from lexmae.retrieval import evaluation
from lexmae.retrieval.evaluation import Settings
from lexmae.retrieval.runs import write_run

QRELS = {f"q{i}": {f"d{i}": 1} for i in range(8)}


def run(ranks):
    """A run that has query i's document at the given rank; 0 leaves it out."""
    return {f"q{i}": [(f"d{i}" if at == rank else f"x{at}", 20 - at) for at in range(1, 12)]
            for i, rank in enumerate(ranks)}


@pytest.fixture
def work(tmp_path):
    write_qrels(tmp_path / "qrels.tsv", QRELS)
    for name, ranks in {"base": [1, 2, 2, 4, 5, 0, 2, 11], "good": [1, 1, 1, 2, 2, 3, 1, 1],
                        "same": [1, 2, 2, 4, 5, 0, 2, 11], "bad": [2, 3, 2, 5, 0, 0, 4, 0]}.items():
        write_run(tmp_path / name, run(ranks))
    return tmp_path


def test_several_runs_are_tested_against_the_first(work, capsys):
    names = [str(work / name) for name in ("base", "good", "same", "bad")]
    command("evaluate", "--run", *names, "--qrels", work / "qrels.tsv", "--json", work / "m.json", "--per-query",
            "--measures", "MRR@10", "Recall@3")
    figures = json.loads((work / "m.json").read_text())
    value = {name: [1 / rank if 1 <= rank <= 10 else 0 for rank in ranks] for name, ranks in {
        "base": [1, 2, 2, 4, 5, 0, 2, 11], "good": [1, 1, 1, 2, 2, 3, 1, 1], "bad": [2, 3, 2, 5, 0, 0, 4, 0]}.items()}
    assert figures["run"] == names[0] and figures["means"]["MRR@10"] == pytest.approx(sum(value["base"]) / 8)
    assert [other["run"] for other in figures["others"]] == names[1:]
    p = {name: scipy.stats.ttest_rel(value[name], value["base"]).pvalue for name in ("good", "bad")}
    found = {other["run"].rpartition("/")[2]: other["tests"][0] for other in figures["others"]}
    assert found["good"]["p_t"] == pytest.approx(p["good"]) and found["bad"]["p_t"] == pytest.approx(p["bad"])
    assert p["good"] < p["bad"] and found["good"]["p_holm"] == pytest.approx(3 * p["good"])  # three tests
    assert found["bad"]["p_holm"] == pytest.approx(2 * p["bad"]) and found["same"]["p_holm"] == 1
    assert (found["good"]["better"], found["good"]["worse"]) == (7, 0)
    assert figures["others"][0]["per_query"]["q3"]["MRR@10"] == 0.5 and figures["per_query"]["q3"]["MRR@10"] == 0.25
    printed = capsys.readouterr().out
    assert "p (Holm)" in printed and f"against {names[0]}" in printed
    with pytest.raises(InputError, match="not all different"):
        command("evaluate", "--run", names[0], names[0], "--qrels", work / "qrels.tsv")


def beir(folder, split="test"):
    write_beir(folder, [Passage(f"d{i}", "", "text") for i in range(8)], [Query(f"q{i}", "text") for i in range(8)],
               {split: QRELS})
    return folder


def test_several_collections_and_their_average(work, capsys):
    one, two = beir(work / "one"), work / "two.tsv"
    write_qrels(two, {"q0": {"d0": 1}, "q3": {"d3": 1}})
    command("evaluate", "--collection", work / "good", one, "--collection", work / "base", two, "--measures", "MRR@10",
            "--json", work / "m.json")
    figures = json.loads((work / "m.json").read_text())
    means = [found["means"]["MRR@10"] for found in figures["collections"]]
    assert means == pytest.approx([(5 + 1 / 2 + 1 / 2 + 1 / 3) / 8, (1 + 1 / 4) / 2])
    assert figures["average"]["MRR@10"] == pytest.approx(sum(means) / 2)  # each collection counts once
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["average", f"{sum(means) / 2:.4f}"] and len(lines) == 4


def test_judgements_of_folders(work, shards_dir, beir_dir):
    beir(work / "b", "dev")
    assert evaluation.open_qrels(work / "b", "dev") == QRELS
    with pytest.raises(InputError, match="no judgements|dev"):
        evaluation.open_qrels(work / "b", "test")
    marco = work / "marco"
    marco.mkdir()
    (marco / "collection.tsv").write_text("d0\ttext\n")
    (marco / "dev.query.txt").write_text("q0\ttext\n")
    (marco / "qrels.dev.tsv").write_text("q0 0 d0 1\n")
    assert evaluation.open_qrels(marco, "dev") == {"q0": {"d0": 1}}
    assert evaluation.open_qrels(shards_dir, "dev") == evaluation.open_qrels(beir_dir, "dev")


def test_a_querys_own_document_is_left_out(work):
    write_run(work / "self", {"d1": [("d1", 3), ("d2", 2)]})
    qrels = {"d1": {"d2": 1}}
    assert evaluation.evaluate_file(work / "self", qrels, Settings(["MRR@10"])).means["MRR@10"] == 0.5
    assert evaluation.evaluate_file(work / "self", qrels, Settings(["MRR@10"], exclude_self=True)).means["MRR@10"] == 1


def test_relevance_of_trec_dl(work, capsys):
    write_qrels(work / "graded.tsv", {"q0": {"d0": 1, "x2": 2}})
    for flag in ("--relevance", "--relevance-level"):
        command("evaluate", "--run", work / "base", "--qrels", work / "graded.tsv", flag, 2, "--measures", "MRR@10")
        assert "MRR@10  0.5000" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "reason"), [
    ([], "one of --run, --collection and --sweep"), (["--run", "a"], "--qrels is needed"),
    (["--run", "a", "--sweep", "--qrels", "q"], "one of --run"),
    (["--collection", "a", "b", "--qrels", "q"], "leave --qrels out"),
    (["--run", "a", "b", "--qrels", "q", "--compare", "c"], "--compare goes with one --run"),
    (["--run", "a", "--qrels", "q", "--per-query"], "--per-query goes with --json"),
    (["--sweep", "--qrels", "q", "--docs", "d"], "--sweep needs --docs, --queries"),
    (["--sweep", "--qrels", "q", "--docs", "d", "--queries", "d", "--top-k-docs", "1", "--output", "o", "--json", "j"],
     "do not go with --sweep")])
def test_options_that_contradict_each_other(arguments, reason):
    with pytest.raises(InputError, match=reason):
        command("evaluate", *arguments)
