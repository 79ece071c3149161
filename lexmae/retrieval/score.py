"""Scores with a cross-encoder: files of negatives for distillation, and runs whose top is ranked anew.

Every rank has its own blocks of queries, and a run that was stopped goes on with those that are missing (see
``blocks``). The pairs of a block are computed sorted by length.

Where documents are split into passages, the score of a document is that of its best passage (MaxP: Dai and Callan,
SIGIR 2019); a name of a passage stands for that passage alone.

Shapes: P pairs, K documents of one query.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lexmae import artifact, sidecar
from lexmae.cli import progress, say
from lexmae.data.negatives import Row, read_negatives, to_line
from lexmae.data.pairs import PairBatch, read_pairs
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.reranker import KIND, CrossEncoder
from lexmae.ranks import together
from lexmae.retrieval import blocks, flow, reports
from lexmae.retrieval.runs import Run, read_run, write_run

BLOCK = 64  # queries per part
DIGITS = 6  # behind the point; float32 has no more for scores of usual size


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


def score(model: str | Path, shards: str | Path, output: str | Path, config: ScoreConfig, *,
          negatives: str | Path | None = None, run: str | Path | None = None,
          overwrite: bool = False) -> dict[str, Any]:
    """Write ``output``: the file ``negatives`` with scores, or the TREC run ``run`` reranked; every rank calls it.

    Returns:
        Numbers of queries and of their documents, and what this rank computed of them in how many seconds.

    Raises:
        InputError: model, shards, split or source do not exist or do not belong together, or ``output`` exists.
    """
    output, source = Path(output), Path(negatives or run)
    with together():
        opened = open_shards(shards, config.split)
        reports.refuse_existing(output, overwrite=overwrite)
        made_with = opened.refuse_other_tokenizer(model, KIND)
        work = (Negatives if negatives else Reranking)(source, opened, config)
    with blocks.ranks() as (rank, world, device), blocks.writing(output, rank, overwrite):
        config = blocks.with_batch_tokens(config, device)
        scorer = CrossEncoder.load(model).to(device).eval()
        max_length = _pair_length(scorer, made_with, opened, config, model)
        name = blocks.precision(config.precision, device)
        state = {"model": made_with.fingerprint if made_with else str(model), "shards": opened.manifest.fingerprint,
                 "source": artifact.checksum(source), "reranks": bool(run), "split": config.split,
                 "depth": config.depth, "max_length": max_length, "precision": name, "block": BLOCK}
        hosts = blocks.hosts(output, **state)
        partial, there = blocks.open_partial(output, state, hosts)
        missing = blocks.missing(blocks.own(len(work.items), BLOCK, rank, world), there,
                                 lambda block: part_path(partial, block).name)
        scoring = _Scoring(scorer, opened, config, max_length, work, partial)
        figures = scoring.run(missing, device, blocks.PRECISIONS[name])
        blocks.collect(hosts, partial, -(-len(work.items) // BLOCK))
        if rank == 0:
            join(partial, output, checksummed=bool(negatives))
            say(f"wrote {output}: {figures['queries']} queries, {figures['documents']} documents")
        hosts.barrier()
    return {**figures, "ranks": world}


def speed(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures with the queries per second of all ranks, as if each were as fast as this one; None where nothing
    was left to compute."""
    here, seconds = figures["queries_here"], figures["seconds"]
    rate = round(here / max(seconds, 1e-9) * figures["ranks"], 2) if here else None
    return {"queries": figures["queries"], "documents": figures["documents"], "ranks": figures["ranks"],
            "seconds": round(seconds, 4), "queries_per_second": rate}


def open_shards(shards: str | Path, split: str) -> Shards:
    """Shards that have this split; InputError where they do not."""
    opened = Shards.open(shards)
    if split not in opened.splits:
        raise InputError(f"has no queries of the split '{split}'; it has {', '.join(opened.splits) or 'none'}", shards)
    return opened


def _pair_length(scorer: CrossEncoder, made_with: artifact.Manifest | None, shards: Shards, config: ScoreConfig,
                 model: str | Path) -> int:
    entries = backbone.word_embeddings(scorer.scorer).shape[0]
    if entries < shards.vocab_size:
        raise InputError(f"knows {entries} tokens, the shards use a vocabulary of {shards.vocab_size}", model)
    extra = shards.manifest.extra
    whole = min(extra["query_length"] + extra["max_length"], scorer.max_length)
    length = config.max_length or (made_with.extra["pair_length"] if made_with else whole)
    if length > scorer.max_length:
        raise InputError(f"reads {scorer.max_length} tokens, which is less than a length of pairs of {length}", model)
    longest = int(shards.queries(config.split).lengths.max(initial=0))
    if length < longest + 3:
        raise InputError(f"a length of pairs of {length} leaves no room for a document beside a query of {longest} "
                         "tokens", model)
    return length


# ------------------------------------------------------------------------------------------------ what is scored


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


def _units(shards: Shards, names: Sequence[str], query: str, source: Path) -> np.ndarray:
    try:
        return units_of(shards, names)
    except InputError as error:
        raise InputError(f"query {query!r}: {error.reason} of {shards.path}", source) from None


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
            units = _units(shards, [*row.negatives[:config.depth], *judged], row.qid, source)
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
        self.ranked = read_run(source)
        self._queries = list(self.ranked)
        rows = shards.queries(config.split).rows(self._queries)
        self.items = [Item(int(row), _units(shards, self.ranked.documents(query)[:config.depth], query,
                                            source).astype(np.int32))
                      for query, row in zip(progress(self._queries, desc="run", unit="queries"), rows, strict=True)]

    def write(self, path: Path, numbers: range, scores: Sequence[np.ndarray]) -> None:
        """Rankings; below the depth, scores count down from that of the last reranked document."""
        rankings = {}
        for number, found in zip(numbers, scores, strict=True):
            names, top = self.ranked.documents(self._queries[number]), found.tolist()
            below = np.floor(min(top, default=0.0)) - 1.0
            behind = [float(below - place) for place in range(len(names) - len(top))]
            rankings[self._queries[number]] = list(zip(names, [*top, *behind], strict=True))
        write_run(path, Run.from_pairs(rankings))


# ----------------------------------------------------------------------------------------------------- computing


class _Pairs(NamedTuple):
    """The pairs of a block: row of each pair's query and document, passages of each unit, units of each item."""

    asked: np.ndarray  # int64 [P]
    docs: np.ndarray  # int64 [P]
    sizes: np.ndarray  # int64 [units]
    ends: np.ndarray  # int64 [items]


class _Scoring:
    """The model at work on the blocks of a rank: a ``flow.Job``."""

    def __init__(self, scorer: CrossEncoder, shards: Shards, config: ScoreConfig, max_length: int, work: Work,
                 partial: Path):
        self.scorer, self.shards, self.config, self.max_length = scorer, shards, config, max_length
        self.queries, self.work, self.partial = shards.queries(config.split), work, partial
        self._pairs: dict[int, _Pairs] = {}  # of the blocks that are under way

    def run(self, missing: Sequence[int], device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
        """Make these parts; returns numbers of queries and documents, and the seconds."""
        items = self.work.items
        here = [items[i] for block in missing for i in self._numbers(block)]
        start = time.perf_counter()
        with progress(total=sum(int(rows_of(self.shards, item.units)[1].sum()) for item in here), desc="score",
                      unit="pairs") as bar:
            flow.run(self, missing, device, dtype, bar.update)
        return {"queries": len(items), "documents": sum(len(item.units) for item in items),
                "queries_here": len(here), "seconds": time.perf_counter() - start}

    def _numbers(self, block: int) -> range:
        return range(block * BLOCK, min((block + 1) * BLOCK, len(self.work.items)))

    def batches(self, block: int) -> list[np.ndarray]:
        items = [self.work.items[i] for i in self._numbers(block)]
        units = np.concatenate([item.units for item in items]).astype(np.int64)
        counts = [len(item.units) for item in items]
        docs, sizes = rows_of(self.shards, units)
        asked = np.repeat(np.repeat([item.query for item in items], counts), sizes)
        self._pairs[block] = _Pairs(asked, docs, sizes, np.cumsum(counts))
        lengths = np.minimum(self.queries.lengths[asked] + self.shards.docs.lengths[docs], self.max_length)
        return list(blocks.by_length(lengths, self.config.batch_tokens))

    def read(self, block: int, batch: np.ndarray) -> PairBatch:
        pairs = self._pairs[block]
        return read_pairs(self.shards, self.queries, pairs.asked[batch], pairs.docs[batch], self.max_length)

    def compute(self, batch: PairBatch) -> Tensor:
        return self.scorer(**batch.arguments())

    def select(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.float(),

    def receive(self, block: int, batch: np.ndarray, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        return arrays[0].astype(np.float64)

    def write(self, block: int, batches: list[np.ndarray], kept: list[np.ndarray]) -> None:
        """The part, with the scores [K] of each item, rounded."""
        pairs = self._pairs.pop(block)
        best = np.empty(len(pairs.docs), np.float64)
        if batches:
            best[np.concatenate(batches)] = np.concatenate(kept)
            best = np.maximum.reduceat(best, np.cumsum(pairs.sizes) - pairs.sizes)
        self._refuse_bad(block, best, pairs.ends)
        self.work.write(part_path(self.partial, block), self._numbers(block),
                        np.split(np.round(best, DIGITS), pairs.ends[:-1]))


    def _refuse_bad(self, block: int, scores: np.ndarray, ends: np.ndarray) -> None:
        """InputError where a score is not finite: fine-tuning would refuse it, and a run has no place for it."""
        bad = np.flatnonzero(~np.isfinite(scores))
        if not len(bad):
            return
        at = int(np.searchsorted(ends, bad[0], side="right"))
        item = self.work.items[self._numbers(block)[at]]
        unit = item.units[bad[0] - (ends[at - 1] if at else 0)]
        name = names_of(self.shards, unit[None])[0]
        raise InputError(f"query {self.queries.id(item.query)!r}: the score of document {name!r} is not finite; if the "
                         "model is sound, --precision fp32 helps")


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
