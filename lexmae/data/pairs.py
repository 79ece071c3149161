"""Query and document as one sequence: what a cross-encoder reads, and the steps of its training.

    [CLS] query [SEP] title [SEP] passage [SEP]

made of the shards' token ids; segment 0 is the query with the tokens around it, segment 1 the rest. A tokenizer that
puts more between two segments (RoBERTa: `</s></s>`) has that between query and document too.

Shapes: P pairs, L tokens, Q queries, G queries of all ranks, N documents per query.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lexmae.artifact import Manifest
from lexmae.config import NegativesConfig
from lexmae.data.batches import Movable, Stream
from lexmae.data.budget import Spread
from lexmae.data.draws import NegativeLists
from lexmae.data.randomness import KeyedRandom
from lexmae.data.shards import Shards, TokenTable
from lexmae.errors import InputError

_NEGATIVE_STREAM = 9


@dataclass
class PairBatch(Movable):
    """Pairs as a cross-encoder takes them: input_ids, attention_mask, token_type_ids int64 [P, L].

    Where the pairs are N documents of each query, they stand query by query, and ``n_docs`` is N.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor
    n_docs: int = 1

    def arguments(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in ("input_ids", "attention_mask", "token_type_ids")}


def read_pairs(shards: Shards, query_table: TokenTable, query_rows: np.ndarray, doc_rows: np.ndarray,
               max_length: int) -> PairBatch:
    """Queries with documents, padded to the longest pair; documents are cut so that a pair fits, and still end with
    the last special token.

    Args:
        query_table: one of ``shards.queries(split)``.
        query_rows: int [P], or [Q].
        doc_rows: rows of ``shards.docs``, int [P], or [Q, N] for N documents of each query.
        max_length: most tokens of a pair.

    Raises:
        InputError: ``max_length`` leaves no room for a token of a document beside one of the queries.
    """
    n_docs = doc_rows.shape[1] if doc_rows.ndim == 2 else 1
    pad, between = shards.special.pad, _between(shards, query_table)
    queries = query_table.pad_batch(np.repeat(query_rows, n_docs), pad)
    docs = shards.docs.pad_batch(doc_rows.reshape(-1), pad)
    first = queries.lengths + len(between)  # where the documents begin
    lengths = pair_lengths(queries.lengths, docs.lengths, len(between), max_length)
    position = np.arange(int(lengths.max(initial=0)))[None, :]  # [1, L]
    source = np.clip(position - first[:, None] + 1, 0, max(docs.ids.shape[1] - 1, 0))  # without the document's [CLS]
    ids = np.take_along_axis(docs.ids, source, axis=1)  # [P, L]
    width = queries.ids.shape[1]
    ids[:, :width] = np.where(position[:, :width] < queries.lengths[:, None], queries.ids, ids[:, :width])
    for offset, token in enumerate(between):
        np.put_along_axis(ids, queries.lengths[:, None] + offset, token, axis=1)
    last = np.take_along_axis(docs.ids, docs.lengths[:, None] - 1, axis=1)
    np.put_along_axis(ids, lengths[:, None] - 1, last, axis=1)
    attention = position < lengths[:, None]
    ids = np.where(attention, ids, pad)
    types = (position >= queries.lengths[:, None]) & attention & shards.token_type_ids
    return PairBatch(*(torch.from_numpy(a.astype(np.int64)) for a in (ids, attention, types)), n_docs=n_docs)


def pair_lengths(query_lengths: np.ndarray, doc_lengths: np.ndarray, between: int, max_length: int) -> np.ndarray:
    """Tokens of each pair, int64 [P].

    Args:
        between: special tokens between the two beside those that a query ends with.
    """
    shortest = query_lengths + between + 2
    if len(shortest) and shortest.max() > max_length:
        raise InputError(f"max_length {max_length}: a query of {query_lengths.max()} tokens leaves no room for a "
                         "document")
    return np.minimum(query_lengths + between + doc_lengths - 1, max_length)


def trained_length(made: Manifest | None, shards: Shards) -> int:
    """Tokens of the pairs that a cross-encoder was trained on; of the longest that the shards have where none says."""
    whole = shards.manifest.extra["query_length"] + shards.manifest.extra["max_length"]  # RoBERTa adds a token between
    return made.extra.get("pair_length", whole) if made else whole


def _between(shards: Shards, query_table: TokenTable) -> np.ndarray:
    """The special tokens that begin a second segment, of which BERT has none and RoBERTa one.

    A row's second segment is these, its text and what ends a row; a query is what begins a row, its text and the same
    end. Text holds no special token, so counting tells them.
    """
    if not len(shards.docs) or not len(query_table):
        return np.zeros(0, np.int64)
    structural = np.asarray(shards.special.structural)
    second = shards.docs.tokens(0)[shards.docs.first_length(0):].astype(np.int64)
    query = query_table.tokens(0).astype(np.int64)
    ending = int(np.isin(query, structural).sum()) - 1  # all but the [CLS]
    return second[:int(np.isin(second, structural).sum()) - ending]


class RerankData:
    """Steps of the cross-encoder's training over the judged (query, positive) pairs of a split.

    Args:
        negatives: lists of negatives by query row.
        micro_batch: queries per micro-batch; the rank's share of the global batch is a multiple of it.
        max_length: most tokens of a pair.
        micro_tokens: tokens of a micro-batch in place of ``micro_batch``, see `budget.Spread`.
    """

    def __init__(self, shards: Shards, split: str, negatives: NegativeLists, config: NegativesConfig, *, seed: int,
                 batch: int, micro_batch: int, max_length: int, rank: int = 0, world: int = 1,
                 micro_tokens: int = 0):
        self.shards, self.queries = shards, shards.queries(split)
        self.negatives, self.config, self.seed = negatives, config, seed
        self.batch, self.max_length = batch, max_length
        self._spread = Spread(rank, world, micro_batch, micro_tokens)
        self._judged = negatives.judged_pairs()  # [examples, 2]
        self._extra = len(_between(shards, self.queries)) - 1  # tokens of a pair beside those of its two texts
        self._stream = Stream(len(self._judged), seed)
        self.size = len(self._judged)

    def __call__(self, step: int) -> list[PairBatch]:
        """The rank's micro-batches of one optimizer step: of each query the positive, then negatives drawn afresh for
        this position of the stream; queries with pairs of similar length together."""
        positions, rows = self._stream.rows(step, self.batch)
        judged = self._judged[rows]
        drawn, _ = self.negatives.draw(judged[:, 0], self.config.per_query, KeyedRandom(self.seed, positions),
                                       _NEGATIVE_STREAM)
        docs = np.concatenate([judged[:, 1:], drawn], axis=1)  # [G, N]
        longest = np.minimum(self.queries.lengths[judged[:, 0]] + self.shards.docs.lengths[docs].max(1) + self._extra,
                             self.max_length)
        return [read_pairs(self.shards, self.queries, judged[part, 0], docs[part], self.max_length)
                for part in self._spread.micro_batches(longest * docs.shape[1])]
