"""Exact search in process: an inverted index in blocks of documents, scored term at a time.

Shapes: D documents, V vocabulary, G blocks of documents, Q queries, K hits.

The accumulators of a block stay in the processor's cache while the postings of the query's terms are added up.
Vectors hold integers (``round(100·v)``), scores are sums of integer products: nothing is rounded and nothing is left
out, whatever the number of hits, threads or segments. Documents are numbered in the order of their ids, so that of
equal scores the lower number comes first.

On disk (kind ``index``): ``vocabulary.json`` and folders ``segment-NNNN`` (see ``segments``). A new index has one
segment; ``updates`` adds further ones, deletes and compacts.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lexmae import artifact
from lexmae.cli import progress
from lexmae.errors import InputError
from lexmae.retrieval import segments
from lexmae.retrieval.kernels import (
    FLOOR,
    FOUND,
    LIMIT,
    PART,
    TILE,
    chunks,
    open_state,
    search_blocks,
    unpack,
)
from lexmae.retrieval.runs import Run
from lexmae.retrieval.stored import StoredVectors
from lexmae.retrieval.vectors import Csr, SparseVectors, read_vocabulary, write_vocabulary

_KEYS = 1 << 21  # kept for a batch of queries: 16 MiB a thread


def build(vectors: SparseVectors, draft: artifact.Draft, threads: int | None = None) -> None:
    """Write the inverted index of document vectors into ``draft``, with all processors by default."""
    segments.write(StoredVectors.of(vectors), draft.path / segments.segment_name(0), threads)
    write_vocabulary(draft.path, vectors.vocabulary)


class ExactIndex:
    """A finished index, memory-mapped.

    Attributes:
        ids: of the documents that are not deleted, in order.
    """

    def __init__(self, path: Path, block: int = segments.BLOCK):
        self.segments = segments.open_segments(path, block)
        ids, self.numbers = segments.number_documents(self.segments)
        self.ids: list[str] = ids.to_pylist()
        self.vocabulary = read_vocabulary(path)
        for segment in self.segments:
            if len(segment.heaviest) != len(self.vocabulary):
                raise InputError(f"has {len(self.vocabulary)} terms in its vocabulary and {len(segment.heaviest)} in a "
                                 "segment", path)
        self._compiled = False
        self._heaviest = np.max([segment.heaviest for segment in self.segments], axis=0).astype(np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries: SparseVectors, hits: int, threads: int) -> Run:
        """The ``hits`` best documents of every query; only documents that share a term with it are found."""
        hits = min(hits, len(self))
        run = Run(self.ids)
        asked = Csr(*(np.array(part) for part in queries.csr))  # writable copies: one compiled form serves them all
        if not self._compiled:  # loads or compiles the kernels before the clock starts
            self._search(asked, 0, min(1, len(queries)), hits)
            self._compiled = True
        started = time.perf_counter()
        bounds = chunks(len(queries), threads, min(256, max(1, _KEYS // _room(hits))))
        if len(bounds) == 1:  # a pool and a bar would cost more than a query
            found = self._search(asked, *bounds[0], hits)
        else:
            with ThreadPoolExecutor(threads) as pool, progress(total=len(queries), desc="search", unit="query") as bar:
                found = []
                for batch in pool.map(lambda part: self._search(asked, *part, hits), bounds):
                    found.extend(batch)
                    bar.update(len(batch))
        for name, (rows, scores) in zip(queries.ids, found, strict=True):
            run.add(name, rows, scores, ordered=True)
        run.seconds = time.perf_counter() - started
        return run

    def _search(self, queries: Csr, first: int, last: int, hits: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rankings of the queries ``first`` to ``last - 1``, as one batch.

        The floor of a query is guessed from the first block that has one of its terms: the score that up to twice the
        block's share of the hits reach, and a few more. A query that found fewer hits than asked for above a guessed
        floor is searched again without a guess.
        """
        state = np.zeros((last - first, 2), np.int64)
        keys = np.empty((last - first, _room(hits)), np.int64)
        open_state(*queries, first, last, self._heaviest, state)
        wide = state[:, FLOOR] < 0
        self._add_up(queries, first, last, hits, state, keys)
        short = ~wide & (state[:, FOUND] < hits) & (state[:, FLOOR] > 1)
        if short.any():
            kept = state[:, FOUND].copy()
            state[:, FOUND], state[:, FLOOR] = 0, np.where(short, 1, -1)
            self._add_up(queries, first, last, hits, state, keys)
            state[:, FOUND] = np.where(short, state[:, FOUND], kept)
        found = []
        for at in range(last - first):
            if wide[at]:  # a score may not fit into 31 bits
                part = slice(*queries.indptr[first + at:][:2])
                found.append(self._search_wide(queries.indices[part], queries.weights[part], hits))
            else:
                found.append(unpack(keys[at, :state[at, FOUND]], hits))
        return found

    def _add_up(self, queries: Csr, first: int, last: int, hits: int, state: np.ndarray, keys: np.ndarray) -> None:
        """All segments, one after the other, for the queries whose floor is not negative."""
        for segment, numbers in zip(self.segments, self.numbers, strict=True):
            scores = np.zeros(segment.block, np.int32)
            search_blocks(segment.starts, segment.postings, numbers, segment.block, *queries, first, last, hits,
                          len(self), state, keys, scores, scores.reshape(-1, TILE),
                          np.empty(segment.block // PART, np.int32))

    def _search_wide(self, terms: np.ndarray, factors: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
        """One query with 64-bit scores, for weights that no trained model gives."""
        scores = np.zeros(len(self), np.int64)
        for segment, numbers in zip(self.segments, self.numbers, strict=True):
            for block, starts in enumerate(segment.starts):
                for term, factor in zip(terms.tolist(), factors.tolist(), strict=True):
                    postings = segment.postings[starts[term]:starts[term + 1]].astype(np.int64)
                    rows = numbers[block * segment.block + (postings & 0xFFFF)]
                    scores[rows[rows >= 0]] += factor * (postings >> 16)[rows >= 0]
        best = np.argsort(-scores, kind="stable")[:hits]
        best = best[scores[best] > 0]
        return best.astype(np.int32), scores[best]


def _room(hits: int) -> int:
    """Keys that a query keeps at most: enough that a selection among them is rarely needed."""
    return max(4 * min(hits, LIMIT // 8), 1024) + TILE
