"""Files of negatives as rows of the shards: without judged positives, at the ranks that a recipe asks for, filtered.

``build`` converts them once into an artifact of kind ``negatives``, which ``draws`` reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lexmae import artifact
from lexmae.cli import progress, say
from lexmae.config import NegativesConfig, NegativeSource
from lexmae.data.draws import KIND, NO_ROWS, NO_SCORES
from lexmae.data.negatives import Row, read_negatives
from lexmae.data.shards import Shards
from lexmae.errors import InputError


@dataclass
class _Source:
    """The lists of one source, by query row, and what was left out of them."""

    config: NegativeSource
    rows: list[np.ndarray]
    scores: list[np.ndarray]
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(
        ("queries", "kept", "positives", "above_margin", "above_ratio", "queries_without_scores"), 0))


def build(shards: Shards, split: str, config: NegativesConfig, output: str | Path, passages: str = "first",
          distil: bool = False) -> None:
    """Write the judged positives and the negatives of every judged query of ``split`` as rows; what was made of the
    same files and shards before is left as it is.

    Judged positives never become negatives, nor do other passages of theirs. Queries that a source does not name
    have an empty list; without a source all have.

    Args:
        config: the sources, their depths, and the filters of false negatives.
        passages: which passages stand for a document where documents are split: the ``first``, ``all``, or ``best``:
            the first, but of a positive the passage that a source notes as its best ranked one (the first that does).
        distil: train on the pairs alone whose positive and negatives all have a teacher's score.

    Raises:
        InputError: the split has no judgements, a source names an unknown document or none of the queries, or there
            are no scores where a filter or distillation needs them, or no best passages; or distillation would learn
            the score of a whole document, which is that of its best passage, from another passage.
    """
    settings = {"split": split, "sources": [vars(source) for source in config.lists], "distil": distil,
                "filter_margin": config.filter_margin, "filter_ratio": config.filter_ratio,
                "checksums": [artifact.checksum(source.path) for source in config.lists]}
    settings |= {"passages": passages} if shards.split_documents else {}
    if _is_made(output, settings, shards):
        return
    best = shards.split_documents and passages == "best"
    stand_in = "first" if passages == "best" else passages
    positives = _positives(shards, split, "all")
    trained = _positives(shards, split, stand_in)
    teacher = [np.full(len(rows), np.nan, np.float32) for rows in trained]
    row_of = {identifier: row for row, identifier in enumerate(shards.queries(split).ids())}
    whole = [np.ones(len(rows), bool) for rows in trained]  # whether the score of its document is a positive's own
    if best:
        taken = _take_best(config, shards, row_of, trained)
        if distil:
            sizes = (shards.documents.sizes(shards.documents.documents_of(rows)) for rows in trained)
            whole = [chosen | (size == 1) for chosen, size in zip(taken, sizes, strict=True)]
    sources, learns = [], distil and shards.split_documents
    for source in config.lists:
        read = _Source(source, [NO_ROWS] * len(row_of), [NO_SCORES] * len(row_of))
        check = functools.partial(_refuse_whole, shards, source.path, best) if learns else None
        _fill(read, shards, stand_in, row_of, positives, trained, teacher, whole, check)
        sources.append(read)
    judged = sum(len(rows) > 0 for rows in positives)
    for source in sources:  # when all of them have told the scores of positives
        _check(source, judged, distil, split)
        _drop_false(source, config, teacher)
    if distil:
        _keep_scored(sources, trained, teacher, split)
    empty = sum(len(own) > 0 and not any(len(source.rows[i]) for source in sources)
                for i, own in enumerate(trained))
    if empty:
        say(f"{empty} of {judged} queries have no hard negatives: random passages are used for them")
    for source in sources:
        source.counts["kept"] = sum(map(len, source.rows))
    inputs = {"shards": shards.manifest.path}
    inputs |= {f"negatives{i or ''}": source.config.path for i, source in enumerate(sources)}
    with artifact.create(output, KIND, inputs=inputs, config=settings, overwrite=True) as draft:
        _save(draft.path, "positives", positives)
        _save(draft.path, "trained", trained, teacher)
        for i, source in enumerate(sources):
            _save(draft.path, f"source{i}", source.rows, source.scores)
        draft.counts.update(queries=judged, without_negatives=empty, documents=len(shards.docs),
                            sources=[source.counts for source in sources])
        draft.extra["shares"] = [source.config.share for source in sources]


def checksums(output: str | Path) -> list[str]:
    """Of the files that rows were made of, in the order of the sources."""
    return artifact.read(output, KIND).config["checksums"]


def _is_made(output: str | Path, settings: Mapping[str, Any], shards: Shards) -> bool:
    """Whether undamaged rows of the same settings, files and shards are there."""
    if not artifact.exists(output):
        return False
    try:
        made = artifact.read(output, KIND)
        artifact.verify(output)
    except InputError:
        return False
    return made.config == settings and made.inputs["shards"].get("fingerprint") == shards.manifest.fingerprint


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


def _take_best(config: NegativesConfig, shards: Shards, row_of: Mapping[str, int],
               trained: list[np.ndarray]) -> list[np.ndarray]:
    """Put the best ranked passages that the sources note in place of the first passages of positives, in place;
    returns for which positives there was one, bool."""
    documents = [shards.documents.documents_of(rows) for rows in trained]
    taken = [np.zeros(len(rows), bool) for rows in trained]
    for source in config.lists:
        for found in progress(read_negatives(source.path), desc="best passages", unit="queries"):
            query = row_of.get(found.qid)
            if query is None or not found.passages:
                continue
            rows = shards.documents.rows_named(found.passages, "first")[0].astype(np.int32)
            for row, document in zip(rows, shards.documents.documents_of(rows), strict=True):
                here = (documents[query] == document) & ~taken[query]
                trained[query][here], taken[query][here] = row, True
    changed, judged = sum(int(known.sum()) for known in taken), sum(map(len, trained))
    if not changed:
        raise InputError("passages: 'best' needs the best ranked passages of positives, and no file of negatives has "
                         "any; tools/mine.py --passages notes them", config.lists[0].path if config.lists else None)
    say(f"{changed} of {judged} positives are their best ranked passage, the others their first")
    return taken


def _fill(source: _Source, shards: Shards, passages: str, row_of: Mapping[str, int], positives: list[np.ndarray],
          trained: list[np.ndarray], teacher: list[np.ndarray], whole: list[np.ndarray],
          check: Callable[[Row, list[str]], None] | None) -> None:
    """Read one source: its ranks from ``skip`` to ``depth``, judged positives not counted; ``check`` sees each row."""
    skip, depth = source.config.skip, source.config.depth
    for found in progress(read_negatives(source.config.path), desc="negatives", unit="queries"):
        query = row_of.get(found.qid)
        if query is None or not len(positives[query]):
            continue
        source.counts["queries"] += 1
        names, known = _top(found, depth + len(positives[query]))
        if check is not None and known is not None:
            check(found, names)
        with shards.looking_up(found.qid, source.config.path):
            rows, places = shards.documents.rows_named(names, passages)
        if known is not None and np.bincount(places, minlength=1).max() > 1:
            raise InputError(f"query {found.qid!r}: scores of documents that are split belong to no single passage",
                             source.config.path)
        scores = np.asarray(known if known is not None else [np.nan] * len(names), np.float32)[places]
        _learn_positives(found, shards, trained[query], teacher[query], whole[query])
        other = ~np.isin(rows, positives[query])
        source.counts["positives"] += int((~other).sum())
        rank = np.unique(places[other], return_inverse=True)[1]  # of documents, however many passages each has
        wanted = (rank >= skip) & (rank < depth)
        source.rows[query], source.scores[query] = rows[other][wanted].astype(np.int32), scores[other][wanted]


def _top(found: Row, count: int) -> tuple[list[str], list[float] | None]:
    """The first documents of a list, and their scores; what it names again does not count again."""
    names = found.negatives[:count]
    if len(set(names)) == len(names):
        return names, found.scores and found.scores[:count]
    places: dict[str, int] = {}
    for place, name in enumerate(found.negatives):
        places.setdefault(name, place)
    names = list(places)[:count]
    return names, found.scores and [found.scores[places[name]] for name in names]


def _refuse_whole(shards: Shards, path: str, best: bool, found: Row, negatives: list[str]) -> None:
    """Refuse scores of documents that have several passages: each is that of a document's best passage, and training
    reads one that may be another. Positives may be such where training reads their ``best`` ranked passages."""
    scored = [negatives] if best else [negatives, list(found.positives or {})]
    remedies = "negatives of tools/mine.py --passages are passages", "'passages: best' trains on that of a positive"
    for names, remedy in zip(scored, remedies, strict=False):
        known = ~shards.docs.contains(names) & shards.documents.contains(names)
        whole = [name for name, one in zip(names, known, strict=True) if one]
        split = shards.documents.sizes(shards.documents.numbers(whole)) > 1
        if split.any():
            raise InputError(f"query {found.qid!r}: the score of '{whole[int(np.argmax(split))]}' is that of its best "
                             f"passage, which is not what distillation trains on; {remedy}, and loss.teacher scores "
                             "whatever is trained on", path)


def _learn_positives(found: Row, shards: Shards, rows: np.ndarray, scores: np.ndarray, whole: np.ndarray) -> None:
    """Note the teacher's scores of a query's positives, in place; those of documents for the ``whole`` ones."""
    for name, score in (found.positives or {}).items():
        if shards.docs.contains([name])[0]:
            scores[rows == shards.docs.rows([name])[0]] = score
        elif shards.documents.contains([name])[0]:
            scores[np.isin(rows, shards.documents.rows_named([name])[0]) & whole] = score


def _drop_false(source: _Source, config: NegativesConfig, teacher: list[np.ndarray]) -> None:
    """Filter one source in place, where filters are asked for, and say what was left out of it."""
    if config.filter_margin is None and config.filter_ratio is None:
        return
    path, counts = source.config.path, source.counts
    listed = [query for query, scores in enumerate(source.scores) if len(scores)]
    for query in listed:
        keep = _not_false(source, config, source.scores[query], teacher[query])
        source.rows[query], source.scores[query] = source.rows[query][keep], source.scores[query][keep]
    if counts["queries_without_scores"] == len(listed):
        raise InputError("has no scores of negatives and positives, which filters need; tools/score.py adds them", path)
    say(f"{path}: {sum(map(len, source.rows))} negatives kept; dropped: {counts['positives']} judged positives, "
        f"{counts['above_margin']} within the margin of the positive's score, {counts['above_ratio']} above its share; "
        f"{counts['queries_without_scores']} queries without scores were not filtered")


def _not_false(source: _Source, config: NegativesConfig, scores: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Which negatives stay: those that the teacher puts clearly below the query's lowest positive.

    ``filter_margin`` m keeps scores up to p − m, ``filter_ratio`` r those up to p − (1 − r)·|p|, which is r·p for a
    positive score p (de Souza P. Moreira et al. 2024, NV-Retriever, TopK-MarginPos and TopK-PercPos).
    """
    keep = np.ones(len(scores), bool)
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


def _check(source: _Source, judged: int, distil: bool, split: str) -> None:
    """Refuse a source that is about other queries, has nothing at its ranks, or lacks scores."""
    path = source.config.path
    if not source.counts["queries"]:
        raise InputError(f"names none of the {judged} judged queries of the split '{split}'", path)
    if not any(map(len, source.rows)):
        raise InputError(f"has no documents between ranks {source.config.skip} and {source.config.depth}, judged "
                         f"positives not counted, for any of its {source.counts['queries']} queries", path)
    if distil and not any(np.isfinite(scores).any() for scores in source.scores):
        raise InputError("has no scores, which distillation learns from; tools/score.py adds them", path)


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
    np.save(folder / f"{name}-rows.npy", np.concatenate([*rows, NO_ROWS]).astype(np.int32))
    if scores is not None:
        np.save(folder / f"{name}-scores.npy", np.concatenate([*scores, NO_SCORES]).astype(np.float32))
