"""Negatives for training: the best ranked documents of each query that are not judged relevant.

The ranking is a model's run or BM25's. Its scores are not passed on: in a file of negatives, scores are a teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lexmae import artifact
from lexmae.cli import say
from lexmae.data.corpus import Corpus, Query
from lexmae.data.negatives import Row
from lexmae.data.passages import document_of
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.retrieval.bm25 import Bm25, token_rows
from lexmae.retrieval.metrics import Qrels
from lexmae.retrieval.runs import Run

DEPTH = 512


@dataclass
class Statistics:
    """What mining found; filled while the rows are consumed.

    Attributes:
        queries: rows written, each with at least one negative.
        negatives: documents in them.
        dropped_positives: judged positives that the ranking held and that were left out.
        without_negatives: judged queries whose ranking is missing or holds positives only; they get no row.
        unjudged: queries of the run without a positive judgement; they get no row.
    """

    queries: int = 0
    negatives: int = 0
    dropped_positives: int = 0
    without_negatives: int = 0
    unjudged: int = 0

    @property
    def mean_negatives(self) -> float:
        """Mean number of negatives per row."""
        return self.negatives / max(self.queries, 1)


def mine_run(run: Run, qrels: Qrels, depth: int = DEPTH,
             statistics: Statistics | None = None, passages: bool = False) -> Iterator[Row]:
    """Rows without scores: the first ``depth`` documents that are not judged relevant.

    Only queries with a positive judgement are of use to training; they come in the order of the judgements.

    Args:
        passages: the run ranks passages of split documents; those of a relevant document are left out, and the best of
            each is noted in ``Row.passages``.
    """
    if depth < 1:
        raise InputError(f"depth must be at least 1, not {depth}")
    counts = statistics if statistics is not None else Statistics()
    positives = {query: {d for d, relevance in judged.items() if relevance > 0} for query, judged in qrels.items()}
    positives = {query: found for query, found in positives.items() if found}
    counts.unjudged = sum(query not in positives for query in run)
    for query, relevant in positives.items():
        ranked = run.documents(query) if query in run else []
        keep = [(document_of(name) if passages else name) not in relevant for name in ranked]
        negatives = [name for name, kept in zip(ranked, keep, strict=True) if kept][:depth]
        counts.dropped_positives += keep.count(False)
        if not negatives:
            counts.without_negatives += 1
            continue
        counts.queries += 1
        counts.negatives += len(negatives)
        yield Row(query, negatives, passages=_best_passages(ranked, keep) if passages else None)


def refuse_passages(run: Run, qrels: Qrels, path: str | Path) -> None:
    """InputError for a run that ranks passages of the judged documents: those of a positive are no negatives."""
    found = False
    for query, judged in qrels.items():
        relevant = {name for name, relevance in judged.items() if relevance > 0}
        ranked = run.documents(query) if relevant and query in run else []
        if not relevant.isdisjoint(ranked):
            return
        found = found or any(document_of(name) in relevant for name in ranked)
    if found:
        raise InputError("ranks passages of the judged documents: --passages is needed", path)


def _best_passages(ranked: list[str], negative: list[bool]) -> list[str] | None:
    """The best ranked passage of each relevant document, in the order of the ranking; None without one."""
    found: dict[str, str] = {}
    for name, other in zip(ranked, negative, strict=True):
        if not other:
            found.setdefault(document_of(name), name)
    return list(found.values()) or None


@dataclass(frozen=True)
class Bm25Run:
    """BM25's ranking of the queries of a split, and what it cost.

    Attributes:
        tokens: how words were broken: ``standard``, ``names``, or ``token ids`` for shards.
        terms_docs, terms_queries: mean numbers of different terms.
        index_bytes: size of the postings in memory.
    """

    run: Run
    tokens: str
    terms_docs: float
    terms_queries: float
    index_bytes: int

    def figures(self) -> dict[str, float | str]:
        """The figures under the names that reports use."""
        return {"tokens": self.tokens, "terms_docs": round(self.terms_docs, 2),
                "terms_queries": round(self.terms_queries, 2), "index_bytes": self.index_bytes,
                "queries_per_second": round(len(self.run) / max(self.run.seconds or 0, 1e-9), 1)}


def ranks_passages(source: str | Path) -> bool:
    """Whether BM25 ranks passages: the source is shards whose documents are split, and not the text itself."""
    return _is_shards(source) and Shards.open(source).split_documents


def _is_shards(source: str | Path) -> bool:
    return artifact.exists(source) and artifact.read(source).kind == "shards"


def bm25_run(source: str | Path, split: str, hits: int, threads: int = 1, tokens: str = "auto") -> Bm25Run:
    """Rank the documents of a collection, or of shards, for the queries of one of their splits.

    Args:
        source: a BEIR or MS MARCO folder, a dataset name, or shards. Shards hold no text: their token ids are the
            terms, without stems and stop words, which ranks clearly worse.
        tokens: ``standard``, ``names`` or ``auto`` (see ``bm25``); without effect on shards.
    """
    if _is_shards(source):
        say(f"{source}: shards hold no text, so BM25 takes token ids as terms; the text itself ranks clearly better")
        shards = Shards.open(source)
        special = shards.special.structural
        index = Bm25.of_tokens(shards.docs, special)
        queries, tokens = list(token_rows(shards.queries(split), special)), "token ids"
    else:
        corpus = Corpus.open(source)
        asked: list[Query] = list(corpus.queries(split))  # an unknown split fails before the documents are read
        index = Bm25.of_text(corpus.passages(), tokens)
        queries, tokens = [(q.id, index.analyzer(q.text)) for q in asked], index.analyzer.tokens
    terms = sum(len(set(row)) for _, row in queries) / max(len(queries), 1)
    return Bm25Run(index.search(queries, hits, threads), tokens, index.mean_terms, terms, index.n_bytes)
