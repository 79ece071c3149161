"""What a teacher scores, whichever it is: files of negatives for distillation, and runs whose top is ranked anew.

Where documents are split into passages, the score of a document is that of its best passage (MaxP: Dai and Callan,
SIGIR 2019); a name of a passage stands for that passage alone.

Shapes: P pairs, K documents of one query.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from lexmae import artifact, sidecar
from lexmae.cli import progress, say
from lexmae.data.negatives import Row, read_negatives, to_line
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.retrieval.runs import Run, read_run, write_run

_DIGITS = 6  # behind the point; float32 has no more for scores of usual size


@dataclass(frozen=True)
class ScoreConfig:
    """What to score, and how.

    Attributes:
        split: of the queries.
        depth: documents at the top of each list; all where it is not given.
        max_length: tokens of a pair; where it is not given, what the model was trained with, or what fits the shards.
        batch_tokens: padded tokens per batch; what suits the device where it is not given.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``auto`` (bf16 on a GPU that has it, fp32 elsewhere).
    """

    split: str
    depth: int | None = None
    max_length: int | None = None
    batch_tokens: int | None = None
    precision: str = "auto"


class Item(NamedTuple):
    """One query and the documents to score with it: its row, and K units (see ``units_of``)."""

    query: int
    units: np.ndarray


class Work(Protocol):
    """A file to be scored.

    Attributes:
        items: what is scored, in the order of the output.
    """

    items: list[Item]

    def write(self, path: Path, numbers: range, scores: Sequence[np.ndarray]) -> None:
        """Write the part of the output that holds these items, given the scores [K] of each."""


def open_shards(shards: str | Path, split: str) -> Shards:
    """Shards that have this split; InputError where they do not."""
    opened = Shards.open(shards)
    opened.refuse_absent(split)
    return opened


def units_of(shards: Shards, names: Sequence[str]) -> np.ndarray:
    """Documents by number, int64 [K]: a row of the shards' table; where documents are split, ``-1 - number`` stands
    for a whole document. InputError names the first that is unknown."""
    if not shards.split_documents:
        return shards.docs.rows(names)
    alone = shards.docs.contains(names)
    units = np.empty(len(names), np.int64)
    units[alone] = shards.docs.rows([name for name, one in zip(names, alone, strict=True) if one])
    units[~alone] = -1 - shards.documents.numbers([name for name, one in zip(names, alone, strict=True) if not one])
    return units


def best_scores(scores: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Scores [K] of units, rounded, from those [P] of their rows, of which each unit has so many (see ``rows_of``)."""
    if not len(sizes):
        return np.zeros(0)
    return np.round(np.maximum.reduceat(scores, np.cumsum(sizes) - sizes), _DIGITS)


def names_of(shards: Shards, units: np.ndarray) -> list[str]:
    """The ids of what ``units_of`` numbered."""
    names = np.empty(len(units), object)
    alone = units >= 0
    names[alone] = shards.docs.ids(units[alone])
    if not alone.all():
        names[~alone] = shards.documents.ids(-1 - units[~alone])
    return names.tolist()


def rows_of(shards: Shards, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the shards' table, unit by unit, and how many each unit has, int64."""
    alone = units >= 0
    if alone.all():
        return units, np.ones_like(units)
    sizes = np.where(alone, 1, shards.documents.sizes(np.where(alone, 0, -1 - units)))
    pieces = [units[i:i + 1] if alone[i] else shards.documents.rows(-1 - units[i:i + 1]) for i in range(len(units))]
    return np.concatenate(pieces), sizes


def _refuse_bad(shards: Shards, query: str, units: np.ndarray, scores: np.ndarray) -> None:
    """InputError where a score is not finite: fine-tuning would refuse it, and a run has no place for it."""
    bad = ~np.isfinite(scores)
    if bad.any():
        name = names_of(shards, units[bad][:1])[0]
        raise InputError(f"query {query!r}: the score of document {name!r} is not finite; if the model is sound, "
                         "--precision fp32 helps")


class Negatives:
    """A file of negatives: the top of each list, and the judged positives of its query."""

    def __init__(self, source: Path, shards: Shards, config: ScoreConfig):
        self.shards, self.queries = shards, shards.queries(config.split)
        row_of = {name: row for row, name in enumerate(self.queries.ids())}
        qrels: Mapping[str, Mapping[str, int]] = shards.qrels(config.split)
        self.items: list[Item] = []
        self._positives: list[int] = []  # how many, at the end of each item's units
        self._passages: list[list[str] | None] = []  # their best ones, which are passed on
        unknown = 0
        for row in progress(read_negatives(source), desc="negatives", unit="queries"):
            if row.qid not in row_of:
                unknown += 1
                continue
            judged = sorted(name for name, relevance in qrels.get(row.qid, {}).items() if relevance > 0)
            with shards.looking_up(row.qid, source):
                units = units_of(shards, [*row.negatives[:config.depth], *judged])
            self.items.append(Item(row_of[row.qid], units.astype(np.int32)))
            self._positives.append(len(judged))
            self._passages.append(row.passages)
        if not self.items:
            raise InputError(f"names no query of the split '{config.split}'", source)
        if unknown:
            say(f"{source}: {unknown} queries are not in the split '{config.split}' and are left out")

    def write(self, path: Path, numbers: range, scores: Sequence[np.ndarray]) -> None:
        """Rows with scores of negatives and positives."""
        rows = []
        for number, found in zip(numbers, scores, strict=True):
            query, units = self.items[number]
            _refuse_bad(self.shards, self.queries.id(query), units, found)
            names, values = names_of(self.shards, units), found.tolist()
            end = len(names) - self._positives[number]
            positives = dict(zip(names[end:], values[end:], strict=True))
            rows.append(Row(self.queries.id(query), names[:end], values[:end], positives or None,
                            self._passages[number]))
        with artifact.atomic_file(path, "wb") as out:
            out.writelines(map(to_line, rows))


class Reranking:
    """A TREC run: the top of each ranking in the order of the new scores, then the rest in its own order."""

    def __init__(self, source: Path, shards: Shards, config: ScoreConfig):
        self.shards, self.ranked = shards, read_run(source)
        self._queries = list(self.ranked)
        rows = shards.queries(config.split).rows(self._queries)
        self.items: list[Item] = []
        for query, row in zip(progress(self._queries, desc="run", unit="queries"), rows, strict=True):
            with shards.looking_up(query, source):
                units = units_of(shards, self.ranked.documents(query)[:config.depth])
            self.items.append(Item(int(row), units.astype(np.int32)))

    def write(self, path: Path, numbers: range, scores: Sequence[np.ndarray]) -> None:
        """Rankings; below the depth, scores count down from that of the last reranked document."""
        rankings = {}
        for number, found in zip(numbers, scores, strict=True):
            _refuse_bad(self.shards, self._queries[number], self.items[number].units, found)
            names, top = self.ranked.documents(self._queries[number]), found.tolist()
            below = np.floor(min(top, default=0.0)) - 1.0
            behind = [float(below - place) for place in range(len(names) - len(top))]
            rankings[self._queries[number]] = list(zip(names, [*top, *behind], strict=True))
        write_run(path, Run.from_pairs(rankings))


def part_path(partial: Path, block: int) -> Path:
    """The part of the output that holds the items of a block."""
    return partial / f"part-{block:06d}"


def join(partial: Path, output: Path, checksummed: bool) -> None:
    """The parts as one file, in order; they are removed when it has its name."""
    with sidecar.checksummed_file(output) if checksummed else artifact.atomic_file(output, "wb") as out:
        for part in sorted(partial.glob("part-*")):
            with open(part, "rb") as content:
                shutil.copyfileobj(content, out)
    shutil.rmtree(partial)
