"""Made-up sparse vectors of any number of texts, the same for the same seed; generated in chunks, so that a large
collection needs no more memory than its arrays.

Terms are drawn from a Zipf-Mandelbrot law, ``p(rank) ~ 1 / (rank + 100)`` over 30,522 terms, which gives the most
frequent term a share of a fifth of the documents and a document about 1.3 terms in common with a query, as trained
encoders do (FLOPS of 1 to 2). Weights are ``round(100 · log1p(g))`` with g from a gamma distribution: 1 to about 350,
half of them below 70, so that some need more than 8 bits. Terms are independent of each other: no topics.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lexmae.retrieval.vectors import Csr, SparseVectors, join

VOCAB = 30_522
TERMS = {"docs": 119, "queries": 35}
_SHIFT = 100
_CHUNK = 10_000


def vectors(side: str, rows: int, seed: int = 0) -> SparseVectors:
    """Vectors of ``rows`` documents or queries (``side``: ``docs`` or ``queries``), ids in numeric order."""
    ids, csr = join(chunks(side, rows, seed))
    return SparseVectors(ids, *csr, [f"t{i}" for i in range(VOCAB)], {"side": side, "scale": 100})


def chunks(side: str, rows: int, seed: int = 0) -> Iterator[tuple[list[str], Csr]]:
    """The same in pieces: (ids, rows)."""
    law = np.cumsum(1 / (np.arange(VOCAB) + _SHIFT))
    law /= law[-1]
    term_of_rank = np.random.default_rng(seed).permutation(VOCAB).astype(np.int32)
    for number, first in enumerate(range(0, rows, _CHUNK)):
        n = min(_CHUNK, rows - first)
        random = np.random.default_rng([seed, side == "docs", number])
        yield [f"{side[0]}{i:08d}" for i in range(first, first + n)], _chunk(random, n, TERMS[side], law, term_of_rank)


def _chunk(random: np.random.Generator, n: int, mean: int, law: np.ndarray, term_of_rank: np.ndarray) -> Csr:
    """``n`` rows of ``mean`` distinct terms each, give or take a quarter."""
    lengths = np.clip(np.rint(random.normal(1.02 * mean, mean / 4, n)), 1, 2 * mean).astype(np.int64)
    rows = np.repeat(np.arange(n), lengths)
    terms = term_of_rank[np.searchsorted(law, random.random(len(rows)))]
    keys = np.unique(rows * VOCAB + terms)  # drawn twice, kept once
    values = np.log1p(random.gamma(1.2, 1.2, len(keys)))
    weights = np.maximum(np.rint(100 * values), 1).astype(np.uint16)
    counts = np.bincount(keys // VOCAB, minlength=n)
    return Csr(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), (keys % VOCAB).astype(np.int32), weights)
