"""Sparse vectors: quantisation against plain Python, and what is written is what is read."""

from __future__ import annotations

import numpy as np
import pytest

from lexmae import artifact
from lexmae.errors import InputError
from lexmae.retrieval import vectors
from lexmae.retrieval.vectors import Csr, SparseVectors, quantise, quantise_csr

VOCABULARY = [f"t{i}" for i in range(50)]


def plain(values, unk_id, scale=100, top_k=None):
    """Row by row, with Python's own round (which rounds halves to even)."""
    rows = []
    for row in values:
        weights = {t: min(round(float(np.float32(v) * np.float32(scale))), 65535) for t, v in enumerate(row)}
        weights = {t: w for t, w in weights.items() if w > 0} or {unk_id: 1}
        if top_k is not None:
            weights = dict(sorted(sorted(weights.items(), key=lambda e: (-e[1], e[0]))[:top_k]))
        rows.append(weights)
    return rows


def as_rows(csr):
    return [dict(zip(csr.indices[a:b].tolist(), csr.weights[a:b].tolist(), strict=True))
            for a, b in zip(csr.indptr[:-1], csr.indptr[1:], strict=True)]


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    dense = rng.exponential(1.0, (20, 50)).astype(np.float32) * (rng.random((20, 50)) < 0.3)
    dense[3] = 0
    dense[4] = 0.004
    dense[19] = 0
    return dense


@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
def test_quantise_agrees_with_plain_python(values, top_k):
    csr = quantise(values, unk_id=7, top_k=top_k)
    assert as_rows(csr) == plain(values, 7, top_k=top_k)
    assert (csr.indptr.dtype, csr.indices.dtype, csr.weights.dtype) == (np.int64, np.int32, np.uint16)


def test_quantise_by_hand():
    csr = quantise(np.array([[0, 0.005, 0.015, 0.0151, 1.0], [0, 0, 0, 0, 0], [700, 0, 0, 0, 2]]), unk_id=0)
    assert as_rows(csr)[1:] == [{0: 1}, {0: 65535, 4: 200}]
    assert as_rows(csr)[0][4] == 100 and as_rows(csr)[0][3] == 2 and 0 not in as_rows(csr)[0]


def test_halves_round_to_even():
    assert as_rows(quantise(np.array([[0.5, 1.5, 2.5]]), unk_id=0, scale=1)) == [{1: 2, 2: 2}]


def test_equal_weights_keep_lower_terms():
    assert as_rows(quantise(np.array([[0, 1, 2, 1, 1]]), unk_id=0, top_k=2)) == [{1: 100, 2: 200}]


def test_sparse_input_gives_the_same(values):
    rows, columns = np.nonzero(values)
    shuffled = np.random.default_rng(1).permutation(len(rows))
    shuffled = shuffled[np.argsort(rows[shuffled], kind="stable")]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=20))])
    for top_k in (None, 3):
        got = quantise_csr(indptr, columns[shuffled], values[rows, columns][shuffled], 7, top_k=top_k)
        assert as_rows(got) == as_rows(quantise(values, 7, top_k=top_k))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_values_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        quantise(np.array([[1.0, bad]]), 0)


def test_empty_batch():
    csr = quantise(np.zeros((0, 50)), 0)
    assert len(csr.indptr) == 1 and len(csr.indices) == 0


def test_round_trip(tmp_path, values):
    made = SparseVectors([f"d{i}" for i in range(20)], *quantise(values, 7), VOCABULARY, {"side": "docs"})
    made.save(tmp_path / "v")
    read = SparseVectors.open(tmp_path / "v", side="docs")
    assert list(read.ids) == made.ids and read.vocabulary == VOCABULARY
    assert as_rows(read.csr) == as_rows(made.csr)
    assert read.extra["vocab_size"] == 50 and read.extra["scale"] == 100
    assert read.mean_active == pytest.approx(sum(map(len, plain(values, 7))) / 20)
    assert artifact.read(tmp_path / "v").counts == {"rows": 20, "postings": len(made.indices)}
    assert [name for name, _, _ in read.rows()] == made.ids
    np.testing.assert_array_equal(read.to_scipy().toarray()[5], made.to_scipy().toarray()[5])
    with pytest.raises(InputError, match="vectors of docs"):
        SparseVectors.open(tmp_path / "v", side="queries")


def test_one_part_is_memory_mapped(tmp_path, values):
    SparseVectors([f"d{i}" for i in range(20)], *quantise(values, 7), VOCABULARY).save(tmp_path / "v")
    assert not SparseVectors.open(tmp_path / "v").weights.flags.owndata


def test_parts_join_in_name_order(tmp_path, values):
    csr = quantise(values, 7)
    with artifact.create(tmp_path / "v", "vectors") as draft:
        vectors.write_vocabulary(draft.path, VOCABULARY)
        for rank, number, low, high in [(1, 0, 12, 20), (0, 1, 5, 12), (0, 0, 0, 5)]:
            at = csr.indptr[low], csr.indptr[high]
            vectors.write_part(draft.path / vectors.part_name(rank, number), [f"d{i}" for i in range(low, high)],
                               csr.indptr[low:high + 1] - at[0], csr.indices[slice(*at)], csr.weights[slice(*at)])
        vectors.describe(draft, side="docs")
    read = SparseVectors.open(tmp_path / "v")
    assert read.ids == [f"d{i}" for i in range(20)] and as_rows(read.csr) == as_rows(csr)


def test_repeated_id_is_an_error(tmp_path):
    SparseVectors(["a", "b", "a"], *quantise(np.ones((3, 50)), 0), VOCABULARY).save(tmp_path / "v")
    with pytest.raises(InputError, match="'a' occurs more than once"):
        SparseVectors.open(tmp_path / "v")


def test_parts_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="belong together"):
        vectors.write_part(tmp_path / "p", ["a"], np.array([0, 2]), np.array([1]), np.array([1]))
    with pytest.raises(ValueError, match="vocabulary has 3"):
        vectors.write_part(tmp_path / "p", ["a"], np.array([0, 1]), np.array([3]), np.array([1]), n_terms=3)
    assert not list(tmp_path.iterdir())


def test_pruned_keeps_the_heaviest(values):
    made = SparseVectors([f"d{i}" for i in range(20)], *quantise(values, 7), VOCABULARY)
    assert as_rows(made.pruned(4).csr) == plain(values, 7, top_k=4)
    with pytest.raises(InputError, match="at least 1"):
        vectors.prune(Csr(*made.csr), 0)


def test_foreign_files_are_refused(tmp_path):
    with artifact.create(tmp_path / "v", "vectors") as draft:
        (draft.path / "part-00000-00000.arrow").write_bytes(b"nothing of the kind")
        vectors.write_vocabulary(draft.path, VOCABULARY)
    with pytest.raises(InputError, match="not an Arrow file"):
        SparseVectors.open(tmp_path / "v")
