"""Retrieval measured while training: a few judged queries against a few documents, with exact dot products.

A probe says when to stop: every so many steps the lexicon encoder, as it is, ranks a small part of the shards. Nothing
of the training changes: dropout is off meanwhile, no random number is drawn, no gradient made. The best model so far is
kept beside the run's own (``output/best``). Figures of a probe are higher than those of a search of all documents, and
comparable with other probes of the same settings only.

Shapes: Q queries, D documents, T texts of the documents (more than D where documents are split), V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lexmae import artifact
from lexmae.cli import say
from lexmae.config import ProbeConfig
from lexmae.data.batches import TextBatch, read_texts
from lexmae.data.shards import Shards, TokenTable
from lexmae.errors import InputError
from lexmae.model.lexical_start import cut
from lexmae.model.lexicon import saturate

_TEXTS = 32  # texts that a rank encodes at a time
_SAMPLE = 256  # texts whose terms are counted
_STREAM = 0x9806  # of the seed, for the choice of queries and documents


@dataclass(frozen=True)
class Selection:
    """What is asked and searched.

    Attributes:
        queries: rows of the split's queries, int64 [Q].
        texts: rows of the documents' texts, int64 [T].
        owner: which document each text belongs to, int64 [T]; documents are numbered in the order of their ids.
        relevant: bool [Q, D].
    """

    queries: np.ndarray
    texts: np.ndarray
    owner: np.ndarray
    relevant: np.ndarray


def check(config: ProbeConfig, shards: Shards) -> None:
    """Refuse a probe that has nothing to measure.

    Raises:
        InputError: the shards do not have the split, or it has no relevant document.
    """
    shards.refuse_absent(config.split, "probe.split")
    if not any(relevance > 0 for judged in shards.qrels(config.split).values() for relevance in judged.values()):
        raise InputError(f"has no relevant document for any query of the split '{config.split}', which probe.split "
                         "names", shards.path)


def select(config: ProbeConfig, shards: Shards, seed: int) -> Selection:
    """Choose queries and documents: a function of the settings, the shards and the seed.

    Queries come in a random order until there are enough; one whose judged documents no longer fit is passed over.
    Random documents fill what is left.

    Raises:
        InputError: the judged documents of no query fit.
    """
    check(config, shards)
    random = np.random.Generator(np.random.PCG64([seed, _STREAM]))
    qrels = {query: judged for query, judged in shards.qrels(config.split).items() if max(judged.values()) > 0}
    names = sorted(qrels)
    chosen: dict[int, None] = {}  # documents, by number
    asked: list[str] = []
    room = config.documents
    for query in (names[i] for i in random.permutation(len(names))):
        numbers = [n for n in shards.documents.numbers(sorted(qrels[query])).tolist() if n not in chosen]
        size = int(shards.documents.sizes(np.array(numbers, np.int64)).sum())
        if size <= room and len(asked) < config.queries:
            asked.append(query)
            chosen.update(dict.fromkeys(numbers))
            room -= size
        if len(asked) == config.queries or (asked and not room):
            break
    if not asked:
        raise InputError(f"probe.documents {config.documents}: the judged documents of no query fit into that")
    count = len(shards.documents)
    others = random.choice(count, min(count, room + len(chosen)), replace=False) if room else np.zeros(0, np.int64)
    for number, size in zip(others.tolist(), shards.documents.sizes(others).tolist(), strict=True):
        if number not in chosen and size <= room:
            chosen[number] = None
            room -= size
    return _selection(shards, config.split, asked, qrels, np.array(list(chosen), np.int64))


def _selection(shards: Shards, split: str, asked: list[str], qrels: Any, documents: np.ndarray) -> Selection:
    ids = shards.documents.ids(documents)
    order = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
    documents = documents[order]
    place = {ids[number]: i for i, number in enumerate(order.tolist())}
    relevant = np.zeros((len(asked), len(documents)), bool)
    for i, query in enumerate(asked):
        relevant[i, [place[name] for name, relevance in qrels[query].items() if relevance > 0]] = True
    owner = np.repeat(np.arange(len(documents)), shards.documents.sizes(documents))
    return Selection(shards.queries(split).rows(asked), shards.documents.rows(documents), owner, relevant)


def best_before(folder: Path, same: Callable[[Mapping[str, Any]], bool]) -> float:
    """MRR@10 of the best model that an earlier part of the run has kept; -1 where there is none.

    A model that was being replaced when the run was stopped gets its name back.

    Args:
        same: whether a model of that recipe counts.
    """
    aside = folder.with_name(folder.name + ".old")
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)
    if not artifact.exists(folder):
        return -1.0
    manifest = artifact.read(folder, "model")
    return float(manifest.extra["probe"]["probe_mrr_10"]) if same(manifest.config) else -1.0


def measures(scores: torch.Tensor, relevant: torch.Tensor) -> dict[str, float]:
    """MRR@10 and Recall@100, means over the queries.

    Args:
        scores: [Q, D], documents in the order of their ids, which decides between equal scores. A document with a
            score of 0 shares no term with the query and is not found.
        relevant: bool [Q, D], at least one in each row.
    """
    ranked, order = torch.sort(scores, dim=1, descending=True, stable=True)
    hits = relevant.gather(1, order) & (ranked > 0)
    rank = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64)
    best = torch.where(hits, 1 / rank, 0.0)[:, :10].amax(1)
    recall = hits[:, :100].sum(1).double() / relevant.sum(1)
    return {"probe_mrr_10": best.mean().item(), "probe_recall_100": recall.mean().item()}


@dataclass
class Probe:
    """Called after every optimizer step by all ranks; measures where one is due.

    Attributes:
        total: steps of the run.
        engine: gives ``evaluating()``, ``rank``, ``world`` and ``device``, and is called as the model.
        encode: (engine, texts, ``docs`` or ``queries``) → vectors [B, V] of texts.
        gather: rows of this rank → rows of all ranks, in the order of the ranks.
        keep: called with step and figures where a model is better than the best before it.
        best: MRR@10 of the best so far; negative where there is none.
        terms: documents have at most this many active terms on average: of more, the largest that are left when all
            logits are lowered alike; None leaves them.
    """

    config: ProbeConfig
    shards: Shards
    selection: Selection
    total: int
    engine: Any
    encode: Callable[[Any, TextBatch, str], torch.Tensor]
    gather: Callable[[torch.Tensor], torch.Tensor]
    keep: Callable[[int, dict[str, Any]], None]
    best: float = -1.0
    terms: int | None = None

    def __call__(self, step: int) -> dict[str, float]:
        """Figures as of ``step`` optimizer steps; empty where no probe is due."""
        if step % self.config.every and step != self.total:
            return {}
        started = time.perf_counter()
        with self.engine.evaluating():
            figures = self._measure()
        if figures["probe_terms_docs"] == 0:
            say(f"warning: step {step}: the probe's documents have no active term: their biases have fallen too low")
        if figures["probe_mrr_10"] > self.best:
            self.best = figures["probe_mrr_10"]
            self.keep(step, figures)
        return {**figures, "probe_seconds": time.perf_counter() - started}

    def _measure(self) -> dict[str, float]:
        chosen, offset = self.selection, self._offset()
        places, vectors = self._all(self.shards.queries(self.config.split), "queries", chosen.queries,
                                    lambda v: lower(v, offset))
        queries = torch.empty(len(chosen.queries), self.shards.vocab_size, device=vectors.device)
        queries[places] = vectors  # [Q, V]

        def against_queries(vectors: torch.Tensor) -> torch.Tensor:
            vectors = lower(vectors, offset)
            return torch.cat([vectors @ queries.T, _terms(vectors)], dim=1)

        places, rows = self._all(self.shards.docs, "docs", chosen.texts, against_queries)
        scores = torch.empty(len(chosen.texts), rows.shape[1])
        scores[places] = rows.cpu()  # [T, Q + 1]
        terms_docs, scores = scores[:, -1].mean().item(), scores[:, :-1]
        owner = torch.from_numpy(chosen.owner)[:, None].expand_as(scores)
        best = scores.new_full((chosen.relevant.shape[1], scores.shape[1]), -torch.inf)
        best.scatter_reduce_(0, owner, scores, "amax")  # [D, Q]: a document is as good as its best text
        return {**measures(best.T, torch.from_numpy(chosen.relevant)), "probe_terms_docs": terms_docs,
                "probe_terms_queries": _terms(queries).mean().item(),
                **({} if self.terms is None else {"probe_offset": offset})}

    def _offset(self) -> float:
        """By how much all logits are lowered."""
        texts = self.selection.texts
        if self.terms is None:
            return 0.0
        some = texts[np.linspace(0, len(texts) - 1, min(_SAMPLE, len(texts))).astype(np.int64)]
        places, vectors = self._all(self.shards.docs, "docs", some, lambda v: v)
        counted = torch.empty(len(some), vectors.shape[1], device=vectors.device)
        counted[places] = vectors  # ranks that share unevenly encode some texts twice
        return math.expm1(cut(counted, self.terms))

    def _all(self, table: TokenTable, side: str, rows: np.ndarray,
             use: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``use`` makes of the vectors of all texts ``rows``, and which of them each result is of.

        Every rank encodes as many texts in as many batches as another, as ZeRO-3 needs; some twice, where the texts
        cannot be shared evenly.
        """
        order = np.argsort(-table.lengths[rows], kind="stable")
        order = np.resize(order, -(-len(order) // self.engine.world) * self.engine.world)
        own = rows[order[self.engine.rank::self.engine.world]]
        found = self.gather(torch.cat([use(vectors) for vectors in self._vectors(table, side, own)]))
        places = np.concatenate([order[rank::self.engine.world] for rank in range(self.engine.world)])
        return torch.from_numpy(places), found

    def _vectors(self, table: TokenTable, side: str, rows: np.ndarray) -> Iterator[torch.Tensor]:
        for start in range(0, len(rows), _TEXTS):
            text = read_texts(self.shards, table, rows[start:start + _TEXTS]).to(self.engine.device)
            yield self.encode(self.engine, text, side)[:, :self.shards.vocab_size].float()


def lower(vectors: torch.Tensor, offset: float) -> torch.Tensor:
    """The vectors [B, V] of logits that are lowered by ``offset``, from those of the logits as they are."""
    return saturate(torch.expm1(vectors) - offset) if offset else vectors


def _terms(vectors: torch.Tensor) -> torch.Tensor:
    """Number of active terms of each vector, [B, 1]."""
    return (vectors > 0).sum(1, keepdim=True).float()
