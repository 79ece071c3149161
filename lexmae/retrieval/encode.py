"""Encodes the texts of shards into sparse vectors: each rank its own blocks, restartable block by block.

The texts are cut into blocks of fixed size, whatever the number of ranks; block ``i`` belongs to rank ``i mod world``
and becomes one part file. A run that was stopped goes on with the blocks that are missing, also on another number of
ranks, and the result is the same.

Shapes: B sequences, L tokens, V vocabulary, P weights that are kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lexmae import artifact
from lexmae.cli import progress, say
from lexmae.data.batches import TextBatch, read_texts
from lexmae.data.shards import Shards, TokenTable
from lexmae.errors import InputError
from lexmae.model.encoder import SparseEncoder
from lexmae.ranks import together
from lexmae.retrieval import blocks, flow, vectors, vocabularies

BLOCK = 4096  # texts per part


@dataclass(frozen=True)
class EncodeConfig:
    """How to encode.

    Attributes:
        side: ``docs`` or ``queries``.
        split: of the queries.
        top_k: keep this many of the largest weights of each text.
        threshold: leave out weights below this, in the units of the vectors (an integer weight is 100 times that).
        batch_tokens: padded tokens per batch; what suits the device where it is not given.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``auto`` (bf16 on a GPU that has it, fp32 elsewhere).
    """

    side: str
    split: str | None = None
    top_k: int | None = None
    batch_tokens: int | None = None
    precision: str = "auto"
    threshold: float | None = None


def encode(model: str | Path, shards: str | Path, output: str | Path, config: EncodeConfig, *,
           overwrite: bool = False) -> None:
    """Write the artifact of vectors ``output``; every rank calls it.

    Raises:
        InputError: model, shards or split do not exist or do not belong together, or ``output`` exists.
    """
    output = Path(output)
    with together() as held:
        table, opened, content = open_inputs(model, shards, config)
        blocks.refuse_existing(output, overwrite)
        held.enter_context(blocks.writing(output, overwrite))
    with held, blocks.ranks() as (rank, world, device):
        config = blocks.with_batch_tokens(config, device)
        hosts = blocks.hosts(output, shards=opened.manifest.fingerprint, model=content)
        name = blocks.precision(config.precision, device)
        state = {"model": content or str(model), "shards": opened.manifest.fingerprint, "side": config.side,
                 "split": config.split, "top_k": config.top_k, "threshold": config.threshold, "precision": name,
                 "block": BLOCK}
        partial, there = blocks.open_partial(output, state, hosts)
        encoder = SparseEncoder.load(model, side=config.side).to(device).eval()
        vocabularies.refuse_longer_texts(encoder, table, model)
        own = blocks.own(len(table), BLOCK, rank, world)
        missing = blocks.missing(own, there, lambda block: vectors.part_name(0, block))
        start = time.perf_counter()
        done = _SparseJob(encoder, opened, table, partial, config).run(missing, device, blocks.PRECISIONS[name])
        seconds = time.perf_counter() - start
        blocks.collect(hosts, partial, -(-len(table) // BLOCK))
        if rank == 0:
            _finish(output, partial, opened, {"model": model, "shards": shards}, content, state)
            say(f"wrote {output}: {len(table)} {config.side}, {done / max(seconds, 1e-9):.0f} texts/s on this rank")
        hosts.barrier()


def open_inputs(model: str | Path, shards: str | Path, config: EncodeConfig,
                representation: str = "lexicon") -> tuple[TokenTable, Shards, str | None]:
    """The texts to encode, their shards, and what tells the model's content; refuses what does not fit."""
    table, opened = _open_table(shards, config)
    made_with = opened.refuse_other_tokenizer(model, "model")
    if made_with is None:
        vocabularies.refuse_other_vocabulary(model, opened, config.side, representation)
    else:
        vocabularies.warn_of_other_length(made_with, opened, config.side)
    return table, opened, artifact.content_of(model)


def _open_table(shards: str | Path, config: EncodeConfig) -> tuple[TokenTable, Shards]:
    opened = Shards.open(shards)
    if config.side == "docs":
        return opened.docs, opened
    return opened.queries(config.split), opened


class TextJob:
    """The texts of a table in blocks of BLOCK through an encoder; ``flow.Job`` but for what becomes of its vectors."""

    def __init__(self, encoder: torch.nn.Module, shards: Shards, table: TokenTable, partial: Path,
                 config: EncodeConfig):
        self.encoder, self.shards, self.table, self.partial, self.config = encoder, shards, table, partial, config

    def rows(self, block: int) -> np.ndarray:
        """The rows of the table that are a block."""
        return np.arange(block * BLOCK, min((block + 1) * BLOCK, len(self.table)))

    def batches(self, block: int) -> list[np.ndarray]:
        """Positions in the block, by length."""
        return list(blocks.by_length(self.table.lengths[self.rows(block)], self.config.batch_tokens))

    def read(self, block: int, batch: np.ndarray) -> TextBatch:
        """The padded texts."""
        return read_texts(self.shards, self.table, self.rows(block)[batch])

    def compute(self, batch: TextBatch) -> Tensor:
        """The encoder's vectors."""
        return self.encoder(**batch.arguments())

    def refuse_bad(self, rows: np.ndarray, good: np.ndarray) -> None:
        """InputError names the first text whose vector is not ``good``."""
        if not good.all():
            name = self.table.ids(rows[[int(np.argmin(good))]])[0]
            raise InputError(f"the model gives '{name}' a vector that is not finite; try --precision fp32")

    def run(self, missing: Sequence[int], device: torch.device, dtype: torch.dtype | None) -> int:
        """Encode these blocks; returns the number of their texts."""
        texts = sum(len(self.rows(block)) for block in missing)
        with progress(total=texts, desc=f"encode {self.config.side}", unit="texts") as bar:
            flow.run(self, missing, device, dtype, bar.update)
        return texts


class _SparseJob(TextJob):
    """Lexicon vectors, one Arrow file for each block."""

    def select(self, values: Tensor) -> tuple[Tensor, ...]:
        return select(values[:, :self.shards.vocab_size].float(), self.config.top_k, self.config.threshold)

    def receive(self, block: int, batch: np.ndarray, arrays: tuple[np.ndarray, ...]) -> vectors.Csr:
        counts, terms, weights, good = arrays
        self.refuse_bad(self.rows(block)[batch], good)
        return vectors.pack(counts, terms, weights, self.shards.special.unk, self.config.top_k)

    def write(self, block: int, batches: list[np.ndarray], kept: list[vectors.Csr]) -> None:
        csr = _reorder(kept, np.concatenate(batches))
        vectors.write_part(self.partial / vectors.part_name(0, block), self.table.ids(self.rows(block)), *csr,
                           n_terms=self.shards.vocab_size)


def select(values: Tensor, top_k: int | None = None, threshold: float | None = None) -> tuple[Tensor, ...]:
    """The weights of lexicon vectors that are kept, found on the device where the vectors are.

    Args:
        values: float32 [B, V].
        top_k: keep the largest weights of each row; all that equal the last of them are selected, and
            ``vectors.pack`` chooses among those.
        threshold: keep weights of at least this much, after rounding.

    Returns:
        how many are kept in each row, int32 [B]; their terms, int32 [P], row by row and ascending; their weights in
        hundredths, float32 [P], rounded as ``vectors.quantise`` does; whether a row is finite and not negative, bool
        [B].
    """
    smallest, largest = values.aminmax(dim=1)
    weights = torch.round(values * vectors.SCALE)
    least = torch.full((len(values), 1), vectors.least_weight(threshold), device=values.device)
    if top_k is not None and top_k < values.shape[1]:
        last = weights.topk(top_k, dim=1, sorted=False).values.amin(1, keepdim=True)
        least = torch.maximum(least, last)
    kept = weights >= least
    places = kept.flatten().nonzero().squeeze(1)
    return (kept.sum(1, dtype=torch.int32), (places % values.shape[1]).int(), weights.flatten()[places],
            (smallest >= 0) & largest.isfinite())


def _reorder(pieces: list[vectors.Csr], order: np.ndarray) -> vectors.Csr:
    """Rows of ``pieces``, of which row ``i`` is text ``order[i]``, put into the order of the texts."""
    _, csr = vectors.join([([""] * (len(piece.indptr) - 1), piece) for piece in pieces])
    back = np.argsort(order, kind="stable")
    counts = np.diff(csr.indptr)[back]
    ends = np.cumsum(counts)
    take = np.repeat(csr.indptr[:-1][back] - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
    return vectors.Csr(np.concatenate([np.zeros(1, np.int64), ends]), csr.indices[take], csr.weights[take])


def _finish(output: Path, partial: Path, shards: Shards, inputs: dict[str, str | Path], content: str | None,
            state: dict) -> None:
    vectors.write_vocabulary(partial, shards.vocabulary())
    draft = artifact.Draft(partial, scaffold=[blocks.STATE])
    vectors.describe(draft, side=state["side"], split=state["split"], top_k=state["top_k"],
                     threshold=state["threshold"], model=content, **vocabularies.facts(shards, state["side"]))
    artifact.seal(draft, output, vectors.KIND, inputs=inputs, config=state)
