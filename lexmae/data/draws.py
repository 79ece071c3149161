"""Negatives by query, memory-mapped rows that ``negative_rows`` has made of files, drawn afresh for every epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lexmae import verification
from lexmae.checked import check_offsets, check_range, read_array
from lexmae.data.randomness import KeyedRandom
from lexmae.errors import InputError

KIND = "negatives"
_QUOTA_STREAM = 1000  # added to the stream of a draw
NO_ROWS, NO_SCORES = np.zeros(0, np.int32), np.zeros(0, np.float32)


class _Lists:
    """Rows, and scores where there are any, by query row; memory-mapped."""

    def __init__(self, folder: Path, name: str, documents: int):
        self.ends = read_array(folder / f"{name}-ends.npy", np.int64)
        self.rows = read_array(folder / f"{name}-rows.npy", np.int32)
        check_offsets(np.concatenate([np.zeros(1, np.int64), self.ends]), len(self.rows), folder, f"ends of {name}")
        check_range(self.rows, documents, folder, f"rows of {name}")
        scores = folder / f"{name}-scores.npy"
        self.scores = read_array(scores, np.float32) if scores.is_file() else None
        if self.scores is not None and len(self.scores) != len(self.rows):
            raise InputError(f"has {len(self.rows)} rows and {len(self.scores)} scores of {name}", folder)

    def part(self, query: int) -> slice:
        """Where the list of a query lies."""
        return slice(0 if query == 0 else self.ends[query - 1], self.ends[query])


class NegativeLists:
    """Judged positives and negatives by query row."""

    def __init__(self, path: str | Path):
        manifest = verification.opened(path, KIND)
        self.documents = manifest.fact("documents", int, "counts")
        shares = manifest.fact("shares", list)
        if not all(isinstance(share, (int, float)) for share in shares):
            raise InputError("shares: numbers are needed", manifest.path)
        self.shares = np.asarray(shares, np.float64)
        self._positives, self._trained = (_Lists(manifest.path, name, self.documents)
                                          for name in ("positives", "trained"))
        self._sources = [_Lists(manifest.path, f"source{i}", self.documents) for i in range(len(self.shares))]

    def judged(self, query: int) -> np.ndarray:
        """Rows of the judged positives of a query, int32, sorted."""
        return self._positives.rows[self._positives.part(query)]

    def judged_pairs(self) -> np.ndarray:
        """Every (query row, positive row) to train on, int64 [pairs, 2]."""
        counts = np.diff(self._trained.ends, prepend=0)
        return np.stack([np.repeat(np.arange(len(counts)), counts), self._trained.rows], axis=1).astype(np.int64)

    def pair_scores(self) -> np.ndarray:
        """The teacher's scores of the positives of ``judged_pairs``, float32 [pairs]; NaN where unknown."""
        return self._trained.scores

    def draw(self, queries: np.ndarray, count: int, random: KeyedRandom,
             stream: int) -> tuple[np.ndarray, np.ndarray]:
        """``count`` negatives for each query, int64 [Q, count], and the teacher's scores of them, float32, or NaN.

        The sources are drawn from by their shares, without replacement and no document twice. What a source lacks
        the others give; where all together are too few, what was drawn is repeated; where there are none, random
        documents that are not judged positives are taken.
        """
        width = max([count, *(self._size(source, int(q)) for source in self._sources for q in queries)])
        noise = [random.uniform(stream + i, width) for i in range(max(1, len(self._sources)))]  # of [Q, width]
        quotas = self._quotas(count, random, stream, len(queries))
        drawn, scores = np.empty((len(queries), count), np.int64), np.full((len(queries), count), np.nan, np.float32)
        for i, query in enumerate(queries):
            rows, known = self._shuffled(int(query), [values[i] for values in noise], quotas[i], count)
            if len(rows):
                drawn[i], scores[i] = np.resize(rows, count), np.resize(known, count)
            else:
                drawn[i] = self._random(int(query), noise[0][i, :count])
        return drawn, scores

    def _quotas(self, count: int, random: KeyedRandom, stream: int, queries: int) -> np.ndarray:
        """How many each source gives, int64 [Q, sources]; their mean is the share (systematic sampling)."""
        if len(self._sources) < 2:
            return np.full((queries, len(self._sources)), count, np.int64)
        bounds = np.concatenate([[0], np.cumsum(count * self.shares / self.shares.sum())])
        bounds[-1] = count
        return np.diff(np.floor(bounds[None, :] + random.uniform(stream + _QUOTA_STREAM, 1)), axis=1).astype(np.int64)

    def _shuffled(self, query: int, noise: list[np.ndarray], quotas: np.ndarray,
                  count: int) -> tuple[np.ndarray, np.ndarray]:
        """At most ``count`` different rows of the query's lists and their scores, in a random order."""
        rows, scores, late = [NO_ROWS], [NO_SCORES], []
        for source, values, quota in zip(self._sources, noise, quotas.tolist(), strict=False):
            part = source.part(query)
            order = np.argsort(values[:part.stop - part.start], kind="stable")
            own, known = source.rows[part][order], source.scores[part][order]
            if len(self._sources) > 1:
                new = ~np.isin(own, np.concatenate(rows))
                own, known = own[new], known[new]
            rows.append(own[:quota])
            scores.append(known[:quota])
            late.append((own[quota:], known[quota:]))
        for own, known in late:  # what other sources lack
            room = count - sum(map(len, rows))
            new = ~np.isin(own, np.concatenate(rows))
            rows.append(own[new][:room])
            scores.append(known[new][:room])
        return np.concatenate(rows), np.concatenate(scores)

    @staticmethod
    def _size(source: _Lists, query: int) -> int:
        part = source.part(query)
        return int(part.stop - part.start)

    def _random(self, query: int, noise: np.ndarray) -> np.ndarray:
        judged = self.judged(query)
        if len(judged) >= self.documents:
            raise InputError("every document is a judged positive of one query: there is nothing to contrast it with")
        rows = (noise * (self.documents - len(judged))).astype(np.int64)
        for positive in judged:  # sorted: skip over each judged row in turn
            rows += rows >= positive
        return rows
