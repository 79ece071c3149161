"""The GPU form of exact search, on torch's CPU device (and on CUDA where there is one), against the CPU search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lexmae.errors import InputError
from lexmae.retrieval import device, engines, segments
from lexmae.retrieval.device import DeviceIndex
from lexmae.retrieval.exact import ExactIndex
from lexmae.retrieval.stored import StoredVectors
from lexmae.retrieval.vectors import SparseVectors, quantise, write_vocabulary

V = 40
VOCABULARY = [f"tok{i}" for i in range(V)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def vectors(n, seed, prefix, scale):
    rng = np.random.default_rng(seed)
    dense = rng.exponential(1.0, (n, V)) * (rng.random((n, V)) < 0.15)
    return SparseVectors([f"{prefix}{i}" for i in rng.permutation(n)], *quantise(dense, 0, scale), VOCABULARY)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("scale", [1, 100, 3000, 60000])
def test_equals_the_search_on_the_cpu(tmp_path, monkeypatch, name, scale):
    """Ties (scale 1), float64 (3000), scores beyond 31 bits (60000); several blocks, batches and segments."""
    monkeypatch.setattr(device, "_BATCH", 4)
    for number in range(2):
        docs = vectors(300, number, "ab"[number], scale)
        segments.write(StoredVectors.of(docs), tmp_path / segments.segment_name(number), block=128)
    np.save(tmp_path / "segment-0000/deleted.npy", np.array([0, 5, 200], np.int32))
    write_vocabulary(tmp_path, VOCABULARY)
    index, queries = ExactIndex(tmp_path, block=128), vectors(10, 3, "q", scale)
    for hits in (1, 30, 2000):
        found = DeviceIndex(index, name).search(queries, hits)
        assert dict(found) == dict(index.search(queries, hits, 1)) and found.seconds > 0


def test_a_posting_takes_eight_bytes(tmp_path):
    """Which decides whether the blocks stay on the device."""
    engines.build(vectors(300, 0, "d", 100), "exact", tmp_path / "i")
    tiles = DeviceIndex(ExactIndex(tmp_path / "i"), "cpu")._tiles
    postings = sum(len(terms) for _, terms, _, _ in tiles)
    assert postings and sum(terms.nbytes + weights.nbytes for _, terms, weights, _ in tiles) == 8 * postings


def test_refusals(tmp_path, monkeypatch):
    index = engines.build(vectors(20, 0, "d", 100), "exact", tmp_path / "i")
    with pytest.raises(InputError, match="cannot search on the device 'abacus'"):
        index.search(vectors(2, 1, "q", 100), 5, device="abacus")
    index.engine = "anserini"
    with pytest.raises(InputError, match="anserini does not search on cuda"):
        index.search(vectors(2, 1, "q", 100), 5, device="cuda")
