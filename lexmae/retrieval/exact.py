"""Exact search in process: an inverted index in blocks of documents, scored term at a time.

Shapes: D documents, V vocabulary, P postings, G blocks of documents, Q queries, K hits.

Documents are numbered in the order of their ids, so that of equal scores the lower number comes first. Block g holds
the documents ``[g·BLOCK, (g + 1)·BLOCK)``: its accumulators stay in the processor's cache while the postings of the
query's terms are added up. Scores are sums of integer products, so nothing is rounded and nothing is left out.

On disk (kind ``index``): ``ids.arrow``; ``starts.npy`` int64 [G, V+1]; ``documents.npy`` uint16 [P], numbers within
the block; ``weights.npy`` uint8 or uint16 [P]; ``vocabulary.json``. The postings of term v in block g are
``starts[g, v]:starts[g, v + 1]``. The arrays are memory-mapped.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lexmae import artifact
from lexmae.checked import check_offsets, check_range, read_array, read_arrow
from lexmae.cli import progress
from lexmae.errors import InputError
from lexmae.retrieval.kernels import LIMIT, chunks, compiled, keep_best, unpack, worst
from lexmae.retrieval.runs import Run
from lexmae.retrieval.vectors import Csr, SparseVectors, read_vocabulary, write_vocabulary

BLOCK = 1 << 15
_IDS = pa.schema([("id", pa.large_string())])
_STRIDE = 64  # accumulators compared with the threshold at a time


def build(vectors: SparseVectors, draft: artifact.Draft) -> None:
    """Write the inverted index of document vectors into ``draft``."""
    ids = pa.array(vectors.ids, type=pa.large_string())
    order = pc.array_sort_indices(ids).to_numpy().astype(np.int64)
    _write_ids(draft.path / "ids.arrow", ids.take(order))
    n_blocks = max(1, -(-len(order) // BLOCK))
    narrow = vectors.weights.max(initial=0) <= 255
    n_postings = len(vectors.indices)
    starts = np.zeros((n_blocks, vectors.n_terms + 1), np.int64)
    documents = _create(draft.path / "documents.npy", np.uint16, n_postings)
    weights = _create(draft.path / "weights.npy", np.uint8 if narrow else np.uint16, n_postings)
    at = 0
    for block in progress(range(n_blocks), desc="index", unit="block"):
        at = _invert(vectors.indptr, vectors.indices, vectors.weights, order[block * BLOCK:(block + 1) * BLOCK],
                     at, starts[block], documents, weights)
    np.save(draft.path / "starts.npy", starts)
    write_vocabulary(draft.path, vectors.vocabulary)


def _create(path: Path, dtype: type, size: int) -> np.ndarray:
    """A new array on disk; an empty one, which cannot be mapped, is written at once."""
    if size == 0:
        np.save(path, np.zeros(0, dtype))
        return np.zeros(0, dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(size,))


def _write_ids(path: Path, ids: pa.Array) -> None:
    table = pa.table({"id": ids})
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)


class ExactIndex:
    """A finished index, memory-mapped."""

    def __init__(self, path: Path):
        self.ids: list[str] = [name for batch in read_arrow(path / "ids.arrow", _IDS)
                               for name in batch.column("id").to_pylist()]
        self.vocabulary = read_vocabulary(path)
        self._starts = read_array(path / "starts.npy", np.int64, 2)
        self._documents = read_array(path / "documents.npy", np.uint16)
        self._weights = _weights(path / "weights.npy")
        self._check(path)
        self._heaviest = int(self._weights.max(initial=0))

    def _check(self, path: Path) -> None:
        """Compiled loops follow these numbers without looking."""
        shape = (max(1, -(-len(self.ids) // BLOCK)), len(self.vocabulary) + 1)
        if self._starts.shape != shape or len(self._documents) != len(self._weights):
            raise InputError(f"arrays of {len(self.ids)} documents and {len(self.vocabulary)} terms do not belong "
                             "together", path)
        whole = np.concatenate([self._starts[:, :-1].ravel(), self._starts[-1, -1:]])
        check_offsets(whole, len(self._documents), path, "starts")
        if (self._starts[1:, 0] != self._starts[:-1, -1]).any():
            raise InputError("the blocks do not join", path)
        for block, starts in enumerate(self._starts):
            check_range(self._documents[starts[0]:starts[-1]], min(BLOCK, len(self.ids) - block * BLOCK), path,
                        "document numbers")

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries: SparseVectors, hits: int, threads: int) -> Run:
        """The ``hits`` best documents of every query; only documents that share a term with it are found."""
        hits = min(hits, len(self))
        asked = Csr(*(np.array(part) for part in queries.csr))  # writable copies: one compiled form serves them all
        bounds = chunks(len(queries), threads)
        self._search(asked, 0, min(1, len(queries)), hits)  # loads or compiles the kernel before the clock starts
        run, started = Run(self.ids), time.perf_counter()
        with ThreadPoolExecutor(threads) as pool, progress(total=len(queries), desc="search", unit="query") as bar:
            jobs = [pool.submit(self._search, asked, first, last, hits) for first, last in bounds]
            for (first, _), job in zip(bounds, jobs, strict=True):
                for offset, (rows, scores) in enumerate(job.result()):
                    run.add(queries.ids[first + offset], rows, scores, ordered=True)
                bar.update(len(job.result()))
        run.seconds = time.perf_counter() - started
        return run

    def _search(self, queries: Csr, first: int, last: int, hits: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rankings of the queries ``first`` to ``last - 1``."""
        keys = np.zeros((last - first, hits), np.int64)
        counts = np.zeros(last - first, np.int64)
        _search_block_wise(self._starts, self._documents, self._weights, len(self), *queries, first, last, hits,
                           self._heaviest, keys, counts)
        found = []
        for row, count in zip(keys, counts.tolist(), strict=True):
            if count < 0:  # a score may not fit into 31 bits
                part = slice(*queries.indptr[first + len(found):][:2])
                found.append(self._search_wide(queries.indices[part], queries.weights[part], hits))
            else:
                found.append(unpack(row[:count]))
        return found

    def _search_wide(self, terms: np.ndarray, factors: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
        """One query with 64-bit scores, for weights that no trained model gives."""
        scores = np.zeros(len(self), np.int64)
        for block, starts in enumerate(self._starts):
            for term, factor in zip(terms.tolist(), factors.tolist(), strict=True):
                part = slice(starts[term], starts[term + 1])
                scores[block * BLOCK + self._documents[part].astype(np.int64)] += (
                    factor * self._weights[part].astype(np.int64))
        best = np.argsort(-scores, kind="stable")[:hits]
        best = best[scores[best] > 0]
        return best.astype(np.int32), scores[best]


def _weights(path: Path) -> np.ndarray:
    try:
        return read_array(path, np.uint8)
    except InputError:
        return read_array(path, np.uint16)


@compiled
def _invert(indptr, indices, weights, rows, at, starts, out_documents, out_weights):
    """Sort the postings of the documents ``rows`` by term, from position ``at`` on; returns the position after."""
    for row in rows:
        for i in range(indptr[row], indptr[row + 1]):
            starts[indices[i] + 1] += 1
    starts[0] = at
    for term in range(len(starts) - 1):
        starts[term + 1] += starts[term]
    free = starts[:-1].copy()
    for number in range(len(rows)):
        row = rows[number]
        for i in range(indptr[row], indptr[row + 1]):
            term = indices[i]
            out_documents[free[term]] = number
            out_weights[free[term]] = weights[i]
            free[term] += 1
    return starts[-1]


@compiled
def _search_block_wise(starts, documents, weights, n_documents, q_indptr, q_terms, q_weights, first, last, hits,
                       heaviest, out_keys, out_counts):
    """The best ``hits`` keys of each query ``first`` to ``last - 1``, in no order; count -1: scores may be too big.

    Documents come in ascending order, so one whose score only equals the worst of ``hits`` kept ones is passed over.
    """
    n_blocks = len(starts)
    scores = np.zeros(BLOCK, np.int32)
    room = max(4 * hits, 4096) + _STRIDE
    keys = np.empty(room, np.int64)
    for query in range(first, last):
        bound = np.int64(0)
        for j in range(q_indptr[query], q_indptr[query + 1]):
            bound += np.int64(q_weights[j]) * heaviest
        if bound > LIMIT:
            out_counts[query - first] = -1
            continue
        found, floor = 0, np.int32(0)
        for block in range(n_blocks):
            touched = False
            for j in range(q_indptr[query], q_indptr[query + 1]):
                factor = np.int32(q_weights[j])
                low, high = starts[block, q_terms[j]], starts[block, q_terms[j] + 1]
                touched |= high > low
                for i in range(low, high):
                    scores[documents[i]] += factor * np.int32(weights[i])
            if not touched:
                continue
            base = block * BLOCK
            size = min(BLOCK, n_documents - base)
            for left in range(0, size, _STRIDE):
                best = np.int32(0)
                for d in range(left, left + _STRIDE):  # BLOCK is a multiple of the stride
                    best = max(best, scores[d])
                if best > floor:
                    for d in range(left, left + _STRIDE):
                        if scores[d] > floor:
                            keys[found] = (np.int64(scores[d]) << 31) | (LIMIT - (base + d))
                            found += 1
                    if found > room - _STRIDE:
                        found = keep_best(keys, found, hits)
                        floor = worst(keys, hits)
            for d in range(size):
                scores[d] = 0
        out_counts[query - first] = keep_best(keys, found, hits)
        for i in range(out_counts[query - first]):
            out_keys[query - first, i] = keys[i]
