"""The benchmark of search engines, at a small size, and its made-up vectors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def synthetic(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import synthetic

    return synthetic


def test_synthetic_vectors(synthetic):
    docs, queries = synthetic.vectors("docs", 2000), synthetic.vectors("queries", 300)
    assert docs.mean_active == pytest.approx(119, rel=0.02) and queries.mean_active == pytest.approx(35, rel=0.05)
    assert (docs.weights.min(), docs.weights.dtype) == (1, np.uint16) and 255 < docs.weights.max() < 500
    for i in (0, 1999):
        terms, _ = docs.row(i)
        assert (np.diff(terms) > 0).all()
    document_frequency = np.sort(np.bincount(docs.indices))[::-1] / len(docs)
    assert 0.15 < document_frequency[0] < 0.25 and 0.08 < document_frequency[100] < 0.12


def test_synthetic_vectors_come_in_pieces_that_do_not_depend_on_their_number(synthetic, monkeypatch):
    monkeypatch.setattr(synthetic, "_CHUNK", 100)
    small, large = synthetic.vectors("docs", 200), synthetic.vectors("docs", 350)
    assert small.ids == large.ids[:200]
    np.testing.assert_array_equal(small.weights, large.weights[:large.indptr[200]])
    np.testing.assert_array_equal(small.indices, large.indices[:large.indptr[200]])
    assert not np.array_equal(synthetic.vectors("docs", 200, seed=1).indices, small.indices)


@pytest.mark.slow
def test_bench_search(tmp_path):
    subprocess.run([sys.executable, BENCHMARKS / "bench_search.py", "--documents", "2000", "--queries", "20",
                    "--rounds", "1", "--check", "5", "--engines", "exact", "naver", "scipy", "splade-index",
                    "--json", tmp_path / "r.json"], check=True, capture_output=True, text=True)
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["engines"]) | set(result["missing"]) == {"exact", "naver", "scipy", "splade-index"}
    for found in result["engines"].values():
        assert found["1000"]["recall"] == 1 and found["10"]["wrong"] == 0 and found["10"]["queries_per_second"] > 0


@pytest.mark.slow
def test_bench_search_on_vectors_of_texts(tmp_path, synthetic):
    """Ids that are no numbers and stand in no order, queries without any hit among them."""
    docs, queries = synthetic.vectors("docs", 700), synthetic.vectors("queries", 12)
    for side, made in (("docs", docs), ("queries", queries)):
        made.ids = [f"{name}/é" for name in np.random.default_rng(1).permutation(made.ids)]
        made.save(tmp_path / "v" / side)
    subprocess.run([sys.executable, BENCHMARKS / "bench_search.py", "--vectors", tmp_path / "v", "--documents", "600",
                    "--rounds", "1", "--check", "12", "--hits", "10", "--json", tmp_path / "r.json"],
                   check=True, capture_output=True, text=True)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["documents"] == 600 and result["queries"] == 12 and result["vectors"].keys() == {"docs", "queries"}
    assert set(result["engines"]) | set(result["missing"]) == {"exact", "naver", "splade-index", "scipy", "anserini",
                                                               "seismic"}
    for name, found in result["engines"].items():
        assert found["10"]["recall"] >= (0.9 if name == "seismic" else 1) and not found["10"]["wrong"]
