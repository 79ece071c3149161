"""Exact search on a GPU in plain torch: blocks of documents as sparse matrices times a dense matrix of queries.

Shapes: D documents of a block, V vocabulary, Q queries of a batch, K hits.

Scores are integers. Below 2²⁴ float32 adds and multiplies them without rounding in any order (cuSPARSE does not use
TF32), above it float64 does up to 2⁵³; so the result is that of the search on the CPU, ties included. Hits are the keys
of ``kernels``, unique integers, so ``topk`` has no ties to break.

The blocks stay on the device where they fit into 70 % of its free memory (8 bytes a posting), else they are copied
there for every batch of queries.
"""

from __future__ import annotations

import time
import warnings

import numpy as np
import torch

from lexmae.cli import progress
from lexmae.errors import InputError
from lexmae.retrieval.exact import ExactIndex
from lexmae.retrieval.kernels import LIMIT, unpack
from lexmae.retrieval.runs import Run
from lexmae.retrieval.vectors import SparseVectors

_BATCH = 256  # queries at once


class DeviceIndex:
    """An exact index as matrices on a torch device."""

    def __init__(self, index: ExactIndex, device: str):
        """InputError where torch does not know the device or has none of the kind."""
        self._index, self._device = index, _device(device)
        self._tiles = []  # (row offsets int32, terms int32, weights float32, low halves of the keys int64 [D])
        self._heaviest = np.max([segment.heaviest for segment in index.segments], axis=0).astype(np.int64)
        n_bytes = 8 * sum(len(segment.postings) for segment in index.segments)
        stay = self._device.type != "cuda" or n_bytes < 0.7 * torch.cuda.mem_get_info(self._device)[0]
        for segment, numbers in zip(index.segments, index.numbers, strict=True):
            live = numbers[numbers >= 0]
            at = 0
            for rows in segment.rows():
                n = len(rows.indptr) - 1
                low = LIMIT - live[at:at + n].astype(np.int64)
                at += n
                tile = [torch.from_numpy(part) for part in (rows.indptr.astype(np.int32), rows.indices.astype(np.int32),
                                                            rows.weights.astype(np.float32), low)]
                self._tiles.append([part.to(self._device) for part in tile] if stay else tile)

    def search(self, queries: SparseVectors, hits: int) -> Run:
        """As ``ExactIndex.search``."""
        hits = min(hits, len(self._index))
        bounds = np.zeros(len(queries), np.int64)
        products = queries.weights.astype(np.int64) * self._heaviest[queries.indices]
        np.add.at(bounds, np.repeat(np.arange(len(queries)), np.diff(queries.indptr)), products)
        if bounds.max(initial=0) > LIMIT:  # scores beyond the keys' 31 bits
            return self._index.search(queries, hits, 1)
        dtype = torch.float32 if bounds.max(initial=0) < 2**24 else torch.float64
        run, started = Run(self._index.ids), time.perf_counter()
        with progress(total=len(queries), desc="search", unit="query") as bar:
            for first in range(0, len(queries), _BATCH):
                last = min(first + _BATCH, len(queries))
                keys = self._best(_dense(queries, first, last, dtype).to(self._device), hits).cpu().numpy()
                for offset, row in enumerate(keys):
                    run.add(queries.ids[first + offset], *unpack(row[row > 0], hits), ordered=True)
                bar.update(last - first)
        run.seconds = time.perf_counter() - started
        return run

    def _best(self, asked: torch.Tensor, hits: int) -> torch.Tensor:
        """Queries [V, Q] → keys int64 [Q, ≤ K], the best first; 0 where there is no hit."""
        best = torch.zeros((asked.shape[1], 0), dtype=torch.int64, device=self._device)
        for tile in self._tiles:
            indptr, terms, weights, low = (part.to(self._device, non_blocking=True) for part in tile)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                documents = torch.sparse_csr_tensor(indptr, terms, weights.to(asked.dtype),
                                                    size=(len(low), len(asked)), check_invariants=False)
            scores = (documents @ asked).T.to(torch.int64)  # [Q, D]
            keys = torch.where(scores > 0, (scores << 31) | low, 0)
            keys = torch.topk(keys, min(hits, keys.shape[1]), dim=1).values
            best = torch.cat([best, keys], 1)
            best = torch.topk(best, min(hits, best.shape[1]), dim=1).values
        return best


def _dense(queries: SparseVectors, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """Queries ``first`` to ``last - 1`` as the columns of a dense matrix [V, Q]."""
    part = slice(queries.indptr[first], queries.indptr[last])
    columns = np.repeat(np.arange(last - first), np.diff(queries.indptr[first:last + 1]))
    dense = torch.zeros((queries.n_terms, last - first), dtype=dtype)
    dense[torch.from_numpy(queries.indices[part].astype(np.int64)), torch.from_numpy(columns)] = torch.from_numpy(
        queries.weights[part].astype(np.float64)).to(dtype)
    return dense


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # `meta` and the like hold no values
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"cannot search on the device '{name}': {str(error).splitlines()[0]}") from error
    return device
