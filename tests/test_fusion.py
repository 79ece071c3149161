"""Fused runs against values worked out by hand and against a plain Python implementation."""

from __future__ import annotations

import random
import statistics

import pytest

from lexmae.errors import InputError
from lexmae.retrieval.fusion import METHODS, fuse
from lexmae.retrieval.runs import Run


def runs(*mappings):
    return [Run.from_pairs(mapping) for mapping in mappings]


ONE = {"q": [("a", 10.0), ("b", 6.0), ("c", 2.0)], "only": [("x", 3.0)]}
TWO = {"q": [("b", 0.9), ("d", 0.5), ("a", 0.1)], "none": []}


def test_reciprocal_ranks_by_hand():
    found = fuse(runs(ONE, TWO), "rrf")
    assert list(found) == ["q", "only", "none"] and found["none"] == []
    assert dict(found["q"]) == pytest.approx({"b": 1 / 62 + 1 / 61, "a": 1 / 61 + 1 / 63, "d": 1 / 62, "c": 1 / 63})
    assert found.documents("q") == ["b", "a", "d", "c"]
    assert dict(fuse(runs(ONE, TWO), "rrf", k=0, weights=[2, 1])["q"]) == pytest.approx(
        {"a": 2 + 1 / 3, "b": 1 + 1, "c": 2 / 3, "d": 1 / 2})
    assert fuse(runs(ONE, TWO), "rrf", hits=2).documents("q") == ["b", "a"]


def test_min_max_by_hand():
    found = fuse(runs(ONE, TWO), "min-max")
    assert dict(found["q"]) == pytest.approx({"a": 1 + 0, "b": 0.5 + 1, "c": 0, "d": 0.5})
    assert dict(found["only"]) == {"x": 1}  # of equal scores all count in full


def test_z_score_by_hand():
    z = 1.224744871391589  # of three values at equal distances: 1 / sqrt(2/3)
    found = fuse(runs(ONE, TWO), "z-score", weights=[1, 2])
    assert dict(found["q"]) == pytest.approx({"a": z - 2 * z, "b": 0 + 2 * z, "c": -z - 2 * z, "d": -z + 0})


def plain(mappings, method, weights):
    """Straight from the table in the module."""
    found = {}
    for query in {q for m in mappings for q in m}:
        names = {d for m in mappings for d, _ in m.get(query, [])}
        for name in names:
            total = 0.0
            for mapping, weight in zip(mappings, weights, strict=True):
                ranking = sorted(mapping.get(query, []), key=lambda p: (-p[1], p[0]))
                scores = dict(ranking)
                if not scores:
                    continue
                low, high = min(scores.values()), max(scores.values())
                if method == "rrf":
                    value = 1 / (60 + 1 + [d for d, _ in ranking].index(name)) if name in scores else 0
                elif method == "min-max":
                    value = (scores[name] - low) / (high - low) if name in scores else 0
                else:
                    value = (scores.get(name, low) - statistics.mean(scores.values())) / statistics.pstdev(
                        scores.values())
                total += weight * value
            found[query, name] = total
    return found


@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_plain_python(method):
    chance = random.Random(5)
    mappings = [{f"q{i}": [(f"d{j}", chance.random() * scale) for j in chance.sample(range(30), 12)]
                 for i in range(9) if chance.random() < 0.8} for scale in (1, 50, 1000)]
    found = fuse(runs(*mappings), method, weights=[1, 0.5, 2])
    assert {(q, d): s for q in found for d, s in found[q]} == pytest.approx(plain(mappings, method, [1, 0.5, 2]))
    for query in found:
        assert found[query] == sorted(found[query], key=lambda p: (-p[1], p[0]))


def test_refusals():
    for arguments, reason in [({"method": "max"}, "unknown way to fuse 'max': known are rrf"),
                              ({"weights": [1.0]}, "1 weights for 2 runs"), ({"hits": 0}, "at least 1 hit"),
                              ({"weights": [1.0, float("nan")]}, "weights must be finite")]:
        with pytest.raises(InputError, match=reason):
            fuse(runs(ONE, TWO), **arguments)
    with pytest.raises(InputError, match="two or more"):
        fuse(runs(ONE))
    with pytest.raises(InputError, match="query 'q': its scores are too large to be normalised by min-max"):
        fuse(runs({"q": [("a", 1e308), ("b", -1e308)]}, {"q": [("a", 1.0)]}), "min-max")
