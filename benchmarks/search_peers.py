"""The engines that `bench_search.py` compares, each behind the same three calls, on one thread.

`Peer(docs, folder)` builds; `size` is its bytes; `search(queries, k)` gives (document rows, scores) per query, best
first, and `one(queries, i, k)` the same for query i alone. A peer that is not installed raises `Missing`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numba
import numpy as np

from lexmae.errors import InputError
from lexmae.retrieval import engines
from lexmae.retrieval.vectors import SparseVectors

Ranking = tuple[np.ndarray, np.ndarray]


class Missing(Exception):
    """The peer cannot run here; the message says why."""


class Peer:
    """What all have in common."""

    latency = True  # a query alone can be timed

    def __init__(self, docs: SparseVectors, folder: Path):
        self.size = self.build(docs, folder)

    def build(self, docs: SparseVectors, folder: Path) -> int:
        """Index the documents; returns the bytes of the index."""
        raise NotImplementedError

    def search(self, queries: SparseVectors, k: int) -> list[Ranking]:
        """All queries, the way the engine likes best."""
        return [self.one(queries, i, k) for i in range(len(queries))]

    def one(self, queries: SparseVectors, i: int, k: int) -> Ranking:
        """Query ``i`` alone."""
        raise NotImplementedError


def bytes_of(folder: Path) -> int:
    """All files under a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def part(queries: SparseVectors, first: int, last: int) -> SparseVectors:
    """Queries ``first`` to ``last - 1``."""
    low, high = queries.indptr[first], queries.indptr[last]
    return SparseVectors(queries.ids[first:last], queries.indptr[first:last + 1] - low, queries.indices[low:high],
                         queries.weights[low:high], queries.vocabulary, queries.extra)


class Exact(Peer):
    """lexmae's engine ``exact``."""

    engine = "exact"

    def build(self, docs, folder):
        self.index = engines.build(docs, self.engine, folder / self.engine)
        self.row = {name: row for row, name in enumerate(docs.ids)}
        return bytes_of(folder / self.engine)

    def search(self, queries, k):
        run = self.index.search(queries, k, threads=1)
        self.seconds = run.seconds
        return [(run._rankings[name][0], run.scores(name)) for name in queries.ids]  # ids are in the order of the rows

    def one(self, queries, i, k):
        return self.search(part(queries, i, i + 1), k)[0]


class Anserini(Exact):
    """Lucene's impact index in a Java process; the time is its own report of queries per second."""

    engine, latency = "anserini", False

    def build(self, docs, folder):
        try:
            return super().build(docs, folder)
        except InputError as error:
            raise Missing(str(error).splitlines()[0]) from error

    def search(self, queries, k):
        run = self.index.search(queries, k, threads=1)
        self.seconds = run.seconds
        return [(np.array([self.row[d] for d in run.documents(name)], np.int64), run.scores(name))
                for name in queries.ids]


@numba.njit(nogil=True)
def _add_up(indptr, documents, weights, terms, factors, n_documents):
    scores = np.zeros(n_documents, np.float32)
    for j in range(len(terms)):
        for i in range(indptr[terms[j]], indptr[terms[j] + 1]):
            scores[documents[i]] += factors[j] * weights[i]
    found = np.argwhere(scores > 0)[:, 0]
    return found, -scores[found]


class Naver(Peer):
    """The algorithm of github.com/naver/splade (``SparseRetrieval``): a loop over the postings of each query term, an
    array of scores as long as the collection, the positive ones picked out, ``argpartition``. Written anew from its
    description, with one flat array of postings in place of one array a term."""

    def build(self, docs, folder):
        matrix = docs.to_scipy().astype(np.float32).tocsc()
        self.n = len(docs)
        self.csc = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data
        return sum(array.nbytes for array in self.csc)

    def one(self, queries, i, k):
        terms, weights = queries.row(i)
        found, negative = _add_up(*self.csc, np.array(terms), weights.astype(np.float32), self.n)
        if len(found) > k:
            chosen = np.argpartition(negative, k)[:k]
            found, negative = found[chosen], negative[chosen]
        order = np.argsort(negative)
        return found[order], -negative[order]


class SpladeIndex(Peer):
    """PyPI ``splade-index``, its numba backend, below the layer that would run an encoder."""

    def build(self, docs, folder):
        try:
            module = importlib.import_module("splade_index.numba.retrieve_utils")
        except ImportError as error:
            raise Missing("splade-index is not installed (pip install --no-deps splade-index)") from error
        self.retrieve = module._retrieve_numba_functional
        matrix = docs.to_scipy().astype(np.float32).tocsc()
        self.scores = {"data": matrix.data, "indices": matrix.indices.astype(np.int32),
                       "indptr": matrix.indptr.astype(np.int32), "num_docs": len(docs)}
        return sum(array.nbytes for array in self.scores.values() if isinstance(array, np.ndarray))

    def search(self, queries, k):
        rows = [queries.row(i) for i in range(len(queries))]
        found, scores = self.retrieve(
            query_tokens_ids=[terms for terms, _ in rows],
            query_tokens_weights=[weights.astype(np.float32) for _, weights in rows], scores=self.scores, k=k,
            sorted=True, return_as="tuple", show_progress=False, n_threads=1)
        return list(zip(found, scores, strict=True))

    def one(self, queries, i, k):
        return self.search(part(queries, i, i + 1), k)[0]


class Scipy(Peer):
    """Columns of a ``scipy.sparse`` CSC matrix times the query's weights, then ``argpartition``."""

    def build(self, docs, folder):
        self.matrix = docs.to_scipy().astype(np.float32).tocsc()
        return self.matrix.data.nbytes + self.matrix.indices.nbytes + self.matrix.indptr.nbytes

    def one(self, queries, i, k):
        terms, weights = queries.row(i)
        scores = self.matrix[:, terms] @ weights.astype(np.float32)
        chosen = np.argpartition(-scores, min(k, len(scores) - 1))[:k]
        chosen = chosen[np.argsort(-scores[chosen])]
        return chosen, scores[chosen]


class Seismic(Peer):
    """PyPI ``pyseismic-lsr``, approximate; its defaults, with ``query_cut`` and ``heap_factor`` for high recall."""

    query_cut, heap_factor = 40, 0.6

    def build(self, docs, folder):
        try:
            seismic = importlib.import_module("seismic")
        except ImportError as error:
            raise Missing("seismic is not installed (pip install pyseismic-lsr)") from error
        self.kind = seismic.get_seismic_string()
        self.names = np.array(docs.vocabulary, dtype=self.kind)
        dataset = seismic.SeismicDataset()
        for name, terms, weights in docs.rows():
            dataset.add_document(name, self.names[terms], weights.astype(np.float32) / 100)
        self.index = seismic.SeismicIndex.build_from_dataset(dataset, num_threads=1)
        self.row = {name: row for row, name in enumerate(docs.ids)}
        self.index.save(str(folder / "seismic"))
        return sum(file.stat().st_size for file in folder.glob("seismic*"))

    def search(self, queries, k):
        ids = np.array(queries.ids, dtype=self.kind)
        rows = [queries.row(i) for i in range(len(queries))]
        found = self.index.batch_search(
            queries_ids=ids, query_components=[self.names[terms] for terms, _ in rows],
            query_values=[weights.astype(np.float32) for _, weights in rows], k=k, query_cut=self.query_cut,
            heap_factor=self.heap_factor, sorted=True, num_threads=1)
        rankings = {hits[0][0]: hits for hits in found if hits}
        return [(np.array([self.row[hit[2]] for hit in rankings.get(name, [])], np.int64),
                 np.array([hit[1] for hit in rankings.get(name, [])])) for name in queries.ids]

    def one(self, queries, i, k):
        return self.search(part(queries, i, i + 1), k)[0]


PEERS: dict[str, type[Peer]] = {"exact": Exact, "naver": Naver, "splade-index": SpladeIndex, "scipy": Scipy,
                                "anserini": Anserini, "seismic": Seismic}


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else "unknown processor"
