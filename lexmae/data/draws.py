"""Negatives by query, converted once to memory-mapped rows, and drawn afresh for every epoch.

A list of negatives names documents; training needs their rows in the shards, without judged positives, at the speed
of an array. ``build`` converts files of negatives into an artifact of kind ``negatives``; ``NegativeLists`` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lexmae import artifact, verification
from lexmae.checked import check_offsets, check_range, read_array
from lexmae.cli import progress, say
from lexmae.config import NegativesConfig, NegativeSource
from lexmae.data.negatives import Row, read_negatives
from lexmae.data.randomness import KeyedRandom
from lexmae.data.shards import Shards
from lexmae.errors import InputError

KIND = "negatives"
_QUOTA_STREAM = 1000  # added to the stream of a draw
_NO_ROWS, _NO_SCORES = np.zeros(0, np.int32), np.zeros(0, np.float32)


@dataclass
class _Source:
    """The lists of one source, by query row, and what was left out of them."""

    config: NegativeSource
    rows: list[np.ndarray]
    scores: list[np.ndarray]
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(
        ("kept", "positives", "above_margin", "above_ratio", "queries_without_scores"), 0))


def build(shards: Shards, split: str, config: NegativesConfig, output: str | Path, passages: str = "first",
          distil: bool = False) -> None:
    """Write the judged positives and the negatives of every judged query of ``split`` as rows.

    Judged positives never become negatives, nor do other passages of theirs. Queries that a source does not name
    have an empty list; without a source all have.

    Args:
        config: the sources, their depths, and the filters of false negatives.
        passages: which passages stand for a document where documents are split: the ``first``, ``all``, or ``best``:
            the first, but of a positive the passage that a source notes as its best ranked one (the first that does).
        distil: train on the pairs alone whose positive and negatives all have a teacher's score.

    Raises:
        InputError: the split has no judgements, a source names an unknown document or none of the queries, or there
            are no scores where a filter or distillation needs them, or no best passages.
    """
    best = shards.split_documents and passages == "best"
    stand_in = "first" if passages == "best" else passages
    positives = _positives(shards, split, "all")
    trained = _positives(shards, split, stand_in)
    teacher = [np.full(len(rows), np.nan, np.float32) for rows in trained]
    row_of = {identifier: row for row, identifier in enumerate(shards.queries(split).ids())}
    if best:
        _take_best(config, shards, row_of, trained)
    sources = []
    for source in config.lists:
        read = _Source(source, [_NO_ROWS] * len(row_of), [_NO_SCORES] * len(row_of))
        _fill(read, config, shards, stand_in, row_of, positives, trained, teacher)
        _check(read, config, positives, distil, split)
        sources.append(read)
    judged = sum(len(rows) > 0 for rows in positives)
    empty = sum(len(own) > 0 and not any(len(source.rows[i]) for source in sources)
                for i, own in enumerate(positives))
    if empty:
        say(f"{empty} of {judged} queries have no hard negatives: random passages are used for them")
    if distil:
        _keep_scored(sources, trained, teacher, split)
    inputs = {"shards": shards.manifest.path}
    inputs |= {f"negatives{i or ''}": source.config.path for i, source in enumerate(sources)}
    settings = {"split": split, "sources": [vars(source.config) for source in sources],
                "filter_margin": config.filter_margin, "filter_ratio": config.filter_ratio}
    settings |= {"passages": passages} if shards.split_documents else {}
    with artifact.create(output, KIND, inputs=inputs, config=settings, overwrite=True) as draft:
        _save(draft.path, "positives", positives)
        _save(draft.path, "trained", trained, teacher)
        for i, source in enumerate(sources):
            _save(draft.path, f"source{i}", source.rows, source.scores)
        draft.counts.update(queries=judged, without_negatives=empty, documents=len(shards.docs),
                            sources=[source.counts for source in sources])
        draft.extra["shares"] = [source.config.share for source in sources]


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


def _take_best(config: NegativesConfig, shards: Shards, row_of: Mapping[str, int], trained: list[np.ndarray]) -> None:
    """Put the best ranked passages that the sources note in place of the first passages of positives, in place."""
    documents = [shards.documents.documents_of(rows) for rows in trained]
    taken = [np.zeros(len(rows), bool) for rows in trained]
    for source in config.lists:
        for found in progress(read_negatives(source.path), desc="best passages", unit="queries"):
            query = row_of.get(found.qid)
            if query is None or not found.passages:
                continue
            rows = shards.documents.rows_named(found.passages, "first").astype(np.int32)
            for row, document in zip(rows, shards.documents.documents_of(rows), strict=True):
                here = (documents[query] == document) & ~taken[query]
                trained[query][here], taken[query][here] = row, True
    changed, judged = sum(int(known.sum()) for known in taken), sum(map(len, trained))
    if not changed:
        raise InputError("passages: 'best' needs the best ranked passages of positives, and no file of negatives has "
                         "any; tools/mine.py --passages notes them", config.lists[0].path if config.lists else None)
    say(f"{changed} of {judged} positives are their best ranked passage, the others their first")


def _fill(source: _Source, config: NegativesConfig, shards: Shards, passages: str, row_of: Mapping[str, int],
          positives: list[np.ndarray], trained: list[np.ndarray], teacher: list[np.ndarray]) -> None:
    """Read one source: its ranks from ``skip`` to ``depth``, judged positives not counted, without what is filtered."""
    skip, depth = source.config.skip, source.config.depth
    for found in progress(read_negatives(source.config.path), desc="negatives", unit="queries"):
        query = row_of.get(found.qid)
        if query is None or not len(positives[query]):
            continue
        names = found.negatives[:depth + len(positives[query])]
        rows = shards.documents.rows_named(names, passages)
        scores = np.full(len(rows), np.nan, np.float32)
        if found.scores is not None:
            if len(rows) != len(names):
                raise InputError(f"query {found.qid!r}: scores of documents that are split, or named twice, belong to "
                                 "no single passage", source.config.path)
            scores = np.asarray(found.scores[:len(names)], np.float32)
        _learn_positives(found, shards, trained[query], teacher[query])
        other = ~np.isin(rows, positives[query])
        source.counts["positives"] += int((~other).sum())
        rows, scores = rows[other][skip:depth].astype(np.int32), scores[other][skip:depth]
        keep = _not_false(source, config, scores, teacher[query])
        source.rows[query], source.scores[query] = rows[keep], scores[keep]
        source.counts["kept"] += int(keep.sum())


def _learn_positives(found: Row, shards: Shards, rows: np.ndarray, scores: np.ndarray) -> None:
    """Note the teacher's scores of a query's positives, in place."""
    for name, score in (found.positives or {}).items():
        if shards.documents.contains([name])[0]:
            scores[np.isin(rows, shards.documents.rows_named([name]))] = score


def _not_false(source: _Source, config: NegativesConfig, scores: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Which negatives stay: those that the teacher puts clearly below the query's lowest positive.

    ``filter_margin`` m keeps scores up to p − m, ``filter_ratio`` r those up to p − (1 − r)·|p|, which is r·p for a
    positive score p (de Souza P. Moreira et al. 2024, NV-Retriever, TopK-MarginPos and TopK-PercPos).
    """
    keep = np.ones(len(scores), bool)
    if config.filter_margin is None and config.filter_ratio is None:
        return keep
    known = teacher[np.isfinite(teacher)]
    if not len(known) or not np.isfinite(scores).all():
        source.counts["queries_without_scores"] += 1
        return keep
    lowest = float(known.min())
    if config.filter_margin is not None:
        above = scores > lowest - config.filter_margin
        source.counts["above_margin"] += int(above.sum())
        keep &= ~above
    if config.filter_ratio is not None:
        above = keep & (scores > lowest - (1 - config.filter_ratio) * abs(lowest))
        source.counts["above_ratio"] += int(above.sum())
        keep &= ~above
    return keep


def _check(source: _Source, config: NegativesConfig, positives: list[np.ndarray], distil: bool, split: str) -> None:
    """Refuse a source that is about other queries, or lacks scores; say what was left out."""
    path, counts = source.config.path, source.counts
    judged = sum(len(rows) > 0 for rows in positives)
    if not any(len(rows) for rows in source.rows) and not (counts["above_margin"] or counts["above_ratio"]):
        raise InputError(f"names none of the {judged} judged queries of the split '{split}'", path)
    if distil and not any(np.isfinite(scores).any() for scores in source.scores):
        raise InputError("has no scores, which distillation learns from; tools/score.py adds them", path)
    if config.filter_margin is None and config.filter_ratio is None:
        return
    listed = sum(len(rows) > 0 for rows in source.rows)
    if counts["queries_without_scores"] and counts["queries_without_scores"] >= listed:
        raise InputError("has no scores of negatives and positives, which filters need; tools/score.py adds them", path)
    say(f"{path}: {counts['kept']} negatives kept; dropped: {counts['positives']} judged positives, "
        f"{counts['above_margin']} within the margin of the positive's score, {counts['above_ratio']} above its share; "
        f"{counts['queries_without_scores']} queries without scores were not filtered")


def _keep_scored(sources: list[_Source], trained: list[np.ndarray], teacher: list[np.ndarray], split: str) -> None:
    """Leave out what a teacher has not scored: negatives, positives, and queries that then lack either; in place."""
    before = sum(map(len, trained))
    for query, rows in enumerate(trained):
        for source in sources:
            known = np.isfinite(source.scores[query])
            source.rows[query], source.scores[query] = source.rows[query][known], source.scores[query][known]
        known = np.isfinite(teacher[query]) & any(len(source.rows[query]) for source in sources)
        trained[query], teacher[query] = rows[known], teacher[query][known]
    left = sum(map(len, trained))
    if not left:
        raise InputError(f"no judged pair of the split '{split}' has a teacher's scores of its positive and negatives")
    if left < before:
        say(f"{before - left} of {before} pairs are left out: the teacher has not scored their positive or negatives")


def _save(folder: Path, name: str, rows: list[np.ndarray], scores: list[np.ndarray] | None = None) -> None:
    np.save(folder / f"{name}-ends.npy", np.cumsum([len(r) for r in rows], dtype=np.int64))
    np.save(folder / f"{name}-rows.npy", np.concatenate([*rows, _NO_ROWS]).astype(np.int32))
    if scores is not None:
        np.save(folder / f"{name}-scores.npy", np.concatenate([*scores, _NO_SCORES]).astype(np.float32))


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
        rows, scores, late = [_NO_ROWS], [_NO_SCORES], []
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
