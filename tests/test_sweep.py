"""The sweep against a brute-force search of pruned vectors; its table, figures and plot."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_search_tools import command

from lexmae.data.corpus import write_qrels
from lexmae.errors import InputError
from lexmae.retrieval import plots, sweep
from lexmae.retrieval.vectors import SparseVectors, quantise

V = 40


def made(n, seed, prefix):
    rng = np.random.default_rng(seed)
    dense = rng.exponential(1.0, (n, V)) * (rng.random((n, V)) < 0.4)
    return SparseVectors([f"{prefix}{i:03d}" for i in range(n)], *quantise(dense, 0), [f"t{i}" for i in range(V)],
                         {"side": "docs" if prefix == "d" else "queries"})


def top(matrix, k):
    """The k largest of each row, in plain Python."""
    kept = np.zeros_like(matrix)
    for row, values in enumerate(matrix):
        for term in sorted(range(V), key=lambda t: (-values[t], t))[:k]:
            kept[row, term] = values[term]
    return kept


@pytest.fixture
def work(tmp_path):
    docs, queries = made(120, 0, "d"), made(30, 1, "q")
    docs.save(tmp_path / "docs")
    queries.save(tmp_path / "q")
    scores = queries.to_scipy().toarray() @ docs.to_scipy().toarray().T
    write_qrels(tmp_path / "qrels.tsv", {q: {docs.ids[row.argmax()]: 1} for q, row in zip(queries.ids, scores,
                                                                                          strict=True)})
    return tmp_path, docs, queries


def expected(docs, queries, k_docs, k_queries):
    """MRR@10 of pruned vectors where the best document of the whole ones is the relevant one."""
    whole = queries.to_scipy().toarray() @ docs.to_scipy().toarray().T
    left, right = (top(v.to_scipy().toarray(), k or V) for v, k in ((queries, k_queries), (docs, k_docs)))
    total = 0.0
    for row, scores in enumerate(left @ right.T):
        order = [d for d in sorted(range(len(scores)), key=lambda d: (-scores[d], d)) if scores[d] > 0][:10]
        best = int(whole[row].argmax())
        total += 1 / (1 + order.index(best)) if best in order else 0
    return total / len(whole)


def test_points_and_outputs(work, capsys):
    folder, docs, queries = work
    command("evaluate", "--sweep", "--docs", folder / "docs", "--queries", folder / "q", "--qrels",
            folder / "qrels.tsv", "--top-k-docs", 6, 2, "--top-k-queries", 3, "--output", folder / "s", "--threads", 1)
    figures = json.loads((folder / "s.json").read_text())
    points = figures["points"]
    assert [(p["top_k_docs"], p["top_k_queries"]) for p in points] == [
        (2, 3), (2, None), (6, 3), (6, None), (None, 3), (None, None)]
    for point in points:
        assert point["means"]["MRR@10"] == pytest.approx(expected(docs, queries, point["top_k_docs"],
                                                                  point["top_k_queries"]))
        assert point["queries_per_second"] > 0 and point["megabytes"] > 0
    assert points[-1]["means"]["MRR@10"] == 1 and points[0]["terms_docs"] == 2 and points[0]["terms_queries"] <= 3
    assert points[0]["megabytes"] < points[-1]["megabytes"] and figures["engine"] == "exact"
    table = (folder / "s.md").read_text().splitlines()
    assert len(table) == 8 and len({len(line) for line in table}) == 1 and table[-1].startswith("|")
    assert capsys.readouterr().out.splitlines() == table
    if plots.available():
        assert (folder / "s.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("lexmae-sweep-*"))
    with pytest.raises(InputError, match="already exists"):
        command("evaluate", "--sweep", "--docs", folder / "docs", "--queries", folder / "q", "--qrels",
                folder / "qrels.tsv", "--top-k-docs", 6, "--output", folder / "s")


def test_without_matplotlib_the_table_still_comes(work, capsys, monkeypatch):
    folder, *_ = work
    monkeypatch.setattr(plots, "available", lambda: False)
    command("evaluate", "--sweep", "--docs", folder / "docs", "--queries", folder / "q", "--qrels",
            folder / "qrels.tsv", "--top-k-docs", 6, "--output", folder / "s", "--measures", "nDCG@10", "Recall@5")
    assert 'pip install "lexmae[plots]"' in capsys.readouterr().err
    assert (folder / "s.md").exists() and not (folder / "s.png").exists()
    assert set(json.loads((folder / "s.json").read_text())["points"][0]["means"]) == {"nDCG@10", "Recall@5"}


def test_refusals(work):
    _, docs, queries = work
    with pytest.raises(InputError, match="faiss does not search"):
        sweep.sweep(docs, queries, {"q000": {"d000": 1}}, top_k_docs=[3], engine="faiss")
    with pytest.raises(InputError, match="at least 1"):
        sweep.sweep(docs, queries, {"q000": {"d000": 1}}, top_k_docs=[0])
