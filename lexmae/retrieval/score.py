"""Scores of a cross-encoder for what ``scored`` describes.

Every rank has its own blocks of queries, and a run that was stopped goes on with those that are missing (see
``blocks``). The pairs of a block are computed sorted by length.

Shapes: P pairs, K documents of one query.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lexmae import artifact
from lexmae.cli import progress, say
from lexmae.data.pairs import PairBatch, read_pairs, trained_length
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.reranker import KIND, CrossEncoder
from lexmae.ranks import together
from lexmae.retrieval import blocks, flow, reports
from lexmae.retrieval.scored import (
    Negatives,
    Reranking,
    ScoreConfig,
    Work,
    best_scores,
    join,
    open_shards,
    part_path,
    rows_of,
)

BLOCK = 64  # queries per part


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
    with together() as held:
        opened = open_shards(shards, config.split)
        reports.refuse_existing(output, overwrite=overwrite)
        made_with = opened.refuse_other_tokenizer(model, KIND)
        work = (Negatives if negatives else Reranking)(source, opened, config)
        held.enter_context(blocks.writing(output, overwrite))
    with held, blocks.ranks() as (rank, world, device):
        config = blocks.with_batch_tokens(config, device)
        scorer = CrossEncoder.load(model).to(device).eval()
        max_length = _pair_length(scorer, made_with, opened, config, model)
        name = blocks.precision(config.precision, device)
        state = {"model": artifact.content_of(model) or str(model), "shards": opened.manifest.fingerprint,
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


def _pair_length(scorer: CrossEncoder, made_with: artifact.Manifest | None, shards: Shards, config: ScoreConfig,
                 model: str | Path) -> int:
    backbone.refuse_few_tokens(scorer.scorer, shards.vocab_size, model)
    trained = trained_length(made_with, shards)
    length = config.max_length or (trained if made_with else min(trained, scorer.max_length))
    if length > scorer.max_length:
        raise InputError(f"reads {scorer.max_length} tokens, which is less than a length of pairs of {length}", model)
    longest = int(shards.queries(config.split).lengths.max(initial=0))
    if length < longest + 3:
        raise InputError(f"a length of pairs of {length} leaves no room for a document beside a query of {longest} "
                         "tokens", model)
    return length


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
        scores = np.empty(len(pairs.docs), np.float64)
        if batches:
            scores[np.concatenate(batches)] = np.concatenate(kept)
        self.work.write(part_path(self.partial, block), self._numbers(block),
                        np.split(best_scores(scores, pairs.sizes), pairs.ends[:-1]))
