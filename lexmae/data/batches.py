"""Batches of pre-training and fine-tuning, as pure functions of (seed, step, rank).

Shapes: B sequences, L tokens, Q queries of this rank, G queries of all ranks, N documents per query.

The examples of a run form one endless stream: epoch after epoch, each in an order of its own. Step ``s`` takes the
positions ``s·batch … (s+1)·batch`` of it, rank ``r`` its contiguous share of those. Nothing has to be saved to resume,
and two ranks together see what one rank sees.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from lexmae.config import MaskingConfig, NegativesConfig
from lexmae.data import masking
from lexmae.data.budget import Spread, balanced, share
from lexmae.data.draws import NegativeLists
from lexmae.data.randomness import KeyedRandom
from lexmae.data.shards import Shards, TokenBatch, TokenTable

_NEGATIVE_STREAM = 8


class Movable:
    """A dataclass of tensors (and of lists and further batches) that can be sent to a device as a whole."""

    def to(self, device: torch.device) -> Any:
        """A copy with every tensor on ``device``."""
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(value: Any) -> Any:
    """Batches, or lists of them, with every tensor in page-locked memory, from which a GPU copies while it computes."""
    return _each_tensor(value, torch.Tensor.pin_memory)


def _each_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_each_tensor(item, change) for item in value]
    if isinstance(value, Movable):
        return replace(value, **{f.name: _each_tensor(getattr(value, f.name), change) for f in fields(value)})
    return change(value) if isinstance(value, torch.Tensor) else value


@dataclass
class TextBatch(Movable):
    """What every model forward takes: input_ids, attention_mask, token_type_ids int64 [B, L]; text_mask bool [B, L]
    is the attention mask without special tokens."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    text_mask: torch.Tensor
    token_type_ids: torch.Tensor

    def arguments(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class PretrainBatch(Movable):
    """A micro-batch of pre-training: ``text.input_ids`` is masked for the encoder; labels are -100 elsewhere."""

    text: TextBatch
    enc_labels: torch.Tensor  # int64 [B, L]
    dec_input_ids: torch.Tensor  # int64 [B, L]
    dec_labels: torch.Tensor  # int64 [B, L]
    enc_count: int  # labelled positions
    dec_count: int


@dataclass
class RankingBatch(Movable):
    """This rank's share of a fine-tuning step.

    ``docs`` are chunks of at most the micro-batch, longest first; row ``i`` of the Q·N documents (query 0's positive,
    its negatives, query 1's positive, …) is row ``doc_order[i]`` of the concatenated chunks.
    ``exclude`` [2, E] are (query, document) pairs of the global batch [G, G·N] that take no part in the loss.
    ``query_order`` puts the rows of the concatenated chunks of ``queries`` into the order of the batch.
    ``teacher_scores`` are a teacher's scores of a query's own documents, NaN where it has not given them; ``pairs``
    are the Q·N pairs in that order, as a teacher reads them that scores the batch itself, some at a time.
    """

    queries: list[TextBatch]
    query_order: torch.Tensor  # int64 [Q]
    docs: list[TextBatch]
    doc_order: torch.Tensor  # int64 [Q·N]
    n_docs: int
    exclude: torch.Tensor  # int64 [2, E]
    teacher_scores: torch.Tensor  # float32 [Q, N]
    pairs: list[Any] = field(default_factory=list)


def text_batch(tokens: TokenBatch, structural: np.ndarray, segments: bool) -> TextBatch:
    """Tensors of padded token ids; ``structural`` are the special ids that are not text."""
    length = tokens.ids.shape[1]
    position = np.arange(length)[None, :]
    attention = position < tokens.lengths[:, None]  # [B, L]
    text = attention & ~np.isin(tokens.ids, structural)
    types = (position >= tokens.first_lengths[:, None]) & attention if segments else np.zeros_like(attention)
    return TextBatch(torch.from_numpy(tokens.ids), torch.from_numpy(attention.astype(np.int64)),
                     torch.from_numpy(text), torch.from_numpy(types.astype(np.int64)))


def read_texts(shards: Shards, table: TokenTable, rows: np.ndarray) -> TextBatch:
    """The texts in ``rows`` of one of the shards' tables, as tensors [len(rows), L]."""
    return text_batch(table.pad_batch(rows, shards.special.pad), np.asarray(shards.special.structural),
                      shards.token_type_ids)


class Stream:
    """Which row of a data set each position of the endless stream of examples is."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._orders: dict[int, np.ndarray] = {}

    def rows(self, step: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the stream and rows of the data set for one global batch, both int64 [batch]."""
        positions = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
        epochs, places = np.divmod(positions, self.size)
        rows = np.empty(batch, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._order(int(epoch))[places[here]]
        return positions, rows

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.size)
        return self._orders[epoch]


class PretrainData:
    """Micro-batches of pre-training over all documents of the shards.

    Args:
        micro_batch: sequences per micro-batch; the rank's share of the global batch is a multiple of it.
        micro_tokens: tokens of a micro-batch in place of that, see `budget.Spread`, there also ``packed``.
    """

    def __init__(self, shards: Shards, config: MaskingConfig, *, seed: int, batch: int, micro_batch: int,
                 rank: int = 0, world: int = 1, micro_tokens: int = 0, packed: bool = False):
        self.shards, self.config, self.seed, self.batch = shards, config, seed, batch
        self._spread = Spread(rank, world, micro_batch, micro_tokens, packed)
        self._stream = Stream(len(shards.docs), seed)
        self._structural = np.asarray(shards.special.structural)
        special = {*shards.special.structural, shards.special.unk}
        self._plain_ids = np.setdiff1d(np.arange(shards.vocab_size), np.asarray(sorted(special)))
        self._starts = shards.word_starts() if config.whole_word else None
        self.size = len(shards.docs)

    def __call__(self, step: int) -> list[PretrainBatch]:
        """The rank's micro-batches of one optimizer step, texts of similar length together."""
        positions, rows = self._stream.rows(step, self.batch)
        return [self._micro(positions[part], rows[part])
                for part in self._spread.micro_batches(self.shards.docs.lengths[rows])]

    def _micro(self, positions: np.ndarray, rows: np.ndarray) -> PretrainBatch:
        tokens = self.shards.docs.pad_batch(rows, self.shards.special.pad)
        text = text_batch(tokens, self._structural, self.shards.token_type_ids)
        words = None if self._starts is None else np.cumsum(self._starts[tokens.ids] | ~text.text_mask.numpy(), axis=1)
        encoder, decoder = masking.mask_pair(tokens.ids, text.text_mask.numpy(), self.shards.special.mask,
                                             self._plain_ids, self.config, KeyedRandom(self.seed, positions), words)
        text.input_ids = torch.from_numpy(encoder.ids)
        return PretrainBatch(text, *(torch.from_numpy(a) for a in (encoder.labels, decoder.ids, decoder.labels)),
                             enc_count=int((encoder.labels != masking.IGNORE).sum()),
                             dec_count=int((decoder.labels != masking.IGNORE).sum()))


class RankingData:
    """Fine-tuning steps over the judged (query, positive) pairs of a split.

    Args:
        negatives: lists of negatives by query row.
        micro_batch: texts per chunk.
        micro_tokens: tokens of a chunk in place of that, see `budget.Spread`, there also ``packed``. The ranks then
            share out the queries so that all have about as many tokens.
        pairs: query rows [n] and document rows [n] → the pairs that a teacher reads.
    """

    def __init__(self, shards: Shards, split: str, negatives: NegativeLists, config: NegativesConfig, *, seed: int,
                 batch: int, micro_batch: int, exclude_judged: bool = True, rank: int = 0, world: int = 1,
                 pairs: Callable[[np.ndarray, np.ndarray], Any] | None = None, micro_tokens: int = 0,
                 packed: bool = False):
        self.shards, self.queries = shards, shards.queries(split)
        self.negatives, self.config, self.seed = negatives, config, seed
        self.batch, self._exclude_judged, self._read_pairs = batch, exclude_judged, pairs
        self._spread = Spread(rank, world, micro_batch, micro_tokens, packed)
        self._pairs = negatives.judged_pairs()  # [pairs, 2]
        self._stream = Stream(len(self._pairs), seed)
        self.size = len(self._pairs)

    def __call__(self, step: int) -> RankingBatch:
        """The rank's share of one optimizer step."""
        positions, rows = self._stream.rows(step, self.batch)
        docs, scores = self._documents(positions, rows)  # [G, N]
        if self._spread.tokens:
            tokens = self.queries.lengths[self._pairs[rows, 0]] + self.shards.docs.lengths[docs].sum(1)
            order = balanced(tokens, self._spread.world)
            rows, docs, scores = rows[order], docs[order], scores[order]
        pairs = self._pairs[rows]  # [G, 2]
        exclude = self._judged_in_batch(pairs, docs) if self._exclude_judged else np.zeros((2, 0), np.int64)
        own = share(self._spread.rank, self._spread.world, self.batch)
        queries, query_order = self._chunks(self.queries, pairs[:, 0])
        chunks, order = self._chunks(self.shards.docs, docs)
        return RankingBatch(queries, torch.from_numpy(query_order), chunks, torch.from_numpy(order), docs.shape[1],
                            torch.from_numpy(exclude), torch.from_numpy(scores[own]),
                            self._for_teacher(pairs[own, 0], docs[own]))

    def _for_teacher(self, queries: np.ndarray, docs: np.ndarray) -> list[Any]:
        """Query rows [Q] and document rows [Q, N] as pairs, no more at a time than a chunk has texts or tokens."""
        if self._read_pairs is None:
            return []
        queries, docs = np.repeat(queries, docs.shape[1]), docs.reshape(-1)
        each = self._spread.size
        if self._spread.tokens:
            longest = int((self.queries.lengths[queries] + self.shards.docs.lengths[docs]).max())
            each = max(1, self._spread.tokens // longest)
        return [self._read_pairs(queries[i:i + each], docs[i:i + each]) for i in range(0, len(queries), each)]

    def _documents(self, positions: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Document rows [G, N] and their teacher's scores: the positive, then negatives drawn for this position."""
        pairs = self._pairs[rows]
        drawn, scores = self.negatives.draw(pairs[:, 0], self.config.per_query, KeyedRandom(self.seed, positions),
                                            _NEGATIVE_STREAM)
        positive = self.negatives.pair_scores()[rows]
        return np.concatenate([pairs[:, 1:], drawn], axis=1), np.concatenate([positive[:, None], scores], axis=1)

    def _judged_in_batch(self, pairs: np.ndarray, docs: np.ndarray) -> np.ndarray:
        """(query, column) of every judged positive of a query in the batch that is not its own column."""
        columns = docs.reshape(-1)
        order = np.argsort(columns, kind="stable")
        ordered = columns[order]
        found = []
        for query, row in enumerate(pairs[:, 0]):
            judged = self.negatives.judged(int(row))
            starts, ends = np.searchsorted(ordered, judged, "left"), np.searchsorted(ordered, judged, "right")
            for start, end in zip(starts, ends, strict=True):
                found += [(query, column) for column in order[start:end] if column != query * docs.shape[1]]
        return np.asarray(sorted(found), np.int64).reshape(-1, 2).T.copy()

    def _chunks(self, table: TokenTable, rows: np.ndarray) -> tuple[list[TextBatch], np.ndarray]:
        """This rank's texts of the global batch's ``rows`` in chunks, and where each of them went."""
        rows = rows.reshape(self._spread.world, -1)
        parts = self._spread.chunks(table.lengths[rows])
        own = rows[self._spread.rank]
        return [read_texts(self.shards, table, own[part]) for part in parts], np.argsort(np.concatenate(parts))


def prefetch(make: Callable[[int], Any], start: int, stop: int, depth: int = 4,
             device: torch.device | None = None) -> Iterator[Any]:
    """``make(start) … make(stop - 1)`` in order, computed in a background thread up to ``depth`` ahead.

    Args:
        device: where the batches will go; for a GPU their tensors are put into page-locked memory, see `pinned`.
    """
    pin = device is not None and device.type == "cuda"
    ready: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: tuple[Any, BaseException | None]) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            if pin:
                torch.cuda.set_device(device)  # of this thread, which would open the first GPU otherwise
            for step in range(start, stop):
                if not put((pinned(make(step)) if pin else make(step), None)):
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()
