"""Negatives by query, converted once to memory-mapped rows, and drawn afresh for every epoch.

A list of negatives names documents; training needs their rows in the shards, without judged positives, at the speed
of an array. ``build`` converts a file of negatives into an artifact of kind ``negatives``; ``NegativeLists`` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lexmae import artifact
from lexmae.cli import progress, say
from lexmae.data.negatives import read_negatives
from lexmae.data.randomness import KeyedRandom
from lexmae.data.shards import Shards
from lexmae.errors import InputError

KIND = "negatives"


def build(shards: Shards, split: str, source: str | Path | None, depth: int, output: str | Path,
          passages: str = "first") -> None:
    """Write the judged positives and the top ``depth`` negatives of every judged query of ``split`` as rows.

    Judged positives never become negatives, nor do other passages of theirs. Queries that ``source`` does not name
    have an empty list; without a source all have.

    Args:
        passages: which passages stand for a document where documents are split: the ``first``, or ``all``.

    Raises:
        InputError: the split has no judgements, or ``source`` names an unknown document.
    """
    queries, docs = shards.queries(split), shards.docs
    positives = _positives(shards, split, "all")
    trained = _positives(shards, split, passages)
    lists: list[np.ndarray] = [np.zeros(0, np.int32)] * len(queries)
    row_of = {identifier: row for row, identifier in enumerate(queries.ids())}
    for qid, names, *_ in progress(read_negatives(source) if source else (), desc="negatives", unit="queries"):
        row = row_of.get(qid)
        if row is None or not len(positives[row]):
            continue
        rows = shards.documents.rows_named(names[:depth + len(positives[row])], passages)
        lists[row] = rows[~np.isin(rows, positives[row])][:depth].astype(np.int32)
    judged = sum(len(rows) > 0 for rows in positives)
    empty = sum(len(p) > 0 and not len(rows) for p, rows in zip(positives, lists, strict=True))
    if source and empty == judged:
        raise InputError(f"names none of the {judged} judged queries of the split '{split}'", source)
    if empty:
        say(f"{empty} of {judged} queries have no hard negatives: random passages are used for them")
    inputs = {"shards": shards.manifest.path} | ({"negatives": source} if source else {})
    config = {"split": split, "depth": depth} | ({"passages": passages} if shards.split_documents else {})
    with artifact.create(output, KIND, inputs=inputs, config=config, overwrite=True) as draft:
        for name, rows in (("positives", positives), ("trained", trained), ("negatives", lists)):
            np.save(draft.path / f"{name}-ends.npy", np.cumsum([len(r) for r in rows], dtype=np.int64))
            np.save(draft.path / f"{name}-rows.npy", np.concatenate([*rows, np.zeros(0, np.int32)]).astype(np.int32))
        draft.counts.update(queries=judged, without_negatives=empty, documents=len(docs))


def _positives(shards: Shards, split: str, passages: str) -> list[np.ndarray]:
    """Rows of the judged positives (relevance above 0) of each query row, sorted."""
    qrels: Mapping[str, Mapping[str, int]] = shards.qrels(split) or {}
    found = []
    for identifier in shards.queries(split).ids():
        names = sorted(name for name, relevance in qrels.get(identifier, {}).items() if relevance > 0)
        rows = shards.documents.rows(shards.documents.numbers(names), passages) if names else np.zeros(0)
        found.append(np.sort(rows).astype(np.int32))
    if not any(len(rows) for rows in found):
        raise InputError(f"the split '{split}' has no judged query to train on", shards.manifest.path)
    return found


class NegativeLists:
    """Judged positives and negatives by query row, memory-mapped."""

    def __init__(self, path: str | Path):
        manifest = artifact.read(path, KIND)
        self.documents = int(manifest.counts["documents"])
        kept = ("positives", "trained", "negatives")
        self._ends = {n: np.load(manifest.path / f"{n}-ends.npy") for n in kept}
        self._rows = {n: np.load(manifest.path / f"{n}-rows.npy", mmap_mode="r").view(np.ndarray) for n in kept}

    def judged(self, query: int) -> np.ndarray:
        """Rows of the judged positives of a query, int32, sorted."""
        return self._slice("positives", query)

    def judged_pairs(self) -> np.ndarray:
        """Every (query row, positive row) to train on, int64 [pairs, 2]."""
        counts = np.diff(self._ends["trained"], prepend=0)
        return np.stack([np.repeat(np.arange(len(counts)), counts), self._rows["trained"]], axis=1).astype(np.int64)

    def draw(self, queries: np.ndarray, count: int, random: KeyedRandom, stream: int) -> np.ndarray:
        """``count`` negatives for each query, int64 [len(queries), count].

        Without replacement where the list is long enough; a shorter list is repeated; an empty one is replaced by
        random documents that are not judged positives.
        """
        width = max([count, *(len(self._slice("negatives", int(q))) for q in queries)])
        noise = random.uniform(stream, width)  # [Q, width]
        drawn = np.empty((len(queries), count), np.int64)
        for i, query in enumerate(queries):
            pool = self._slice("negatives", int(query))
            if not len(pool):
                drawn[i] = self._random(int(query), noise[i, :count])
                continue
            order = np.argsort(noise[i, :len(pool)], kind="stable")
            drawn[i] = np.resize(pool[order], count) if count else pool[:0]
        return drawn

    def _random(self, query: int, noise: np.ndarray) -> np.ndarray:
        judged = self.judged(query)
        if len(judged) >= self.documents:
            raise InputError("every document is a judged positive of one query: there is nothing to contrast it with")
        rows = (noise * (self.documents - len(judged))).astype(np.int64)
        for positive in judged:  # sorted: skip over each judged row in turn
            rows += rows >= positive
        return rows

    def _slice(self, name: str, query: int) -> np.ndarray:
        ends = self._ends[name]
        return self._rows[name][0 if query == 0 else ends[query - 1]:ends[query]]
