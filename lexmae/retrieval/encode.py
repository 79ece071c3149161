"""Encodes the texts of shards into sparse vectors: each rank its own blocks, restartable block by block.

The texts are cut into blocks of fixed size, whatever the number of ranks; block ``i`` belongs to rank ``i mod world``
and becomes one part file. A run that was stopped goes on with the blocks that are missing, also on another number of
ranks, and the result is the same.

Shapes: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lexmae import artifact
from lexmae.cli import progress, say
from lexmae.data.batches import read_texts
from lexmae.data.shards import Shards, TokenTable
from lexmae.errors import InputError
from lexmae.model.encoder import SparseEncoder
from lexmae.ranks import together
from lexmae.retrieval import blocks, vectors, vocabularies

BLOCK = 4096  # texts per part


@dataclass(frozen=True)
class EncodeConfig:
    """How to encode.

    Attributes:
        side: ``docs`` or ``queries``.
        split: of the queries.
        top_k: keep this many of the largest weights of each text.
        batch_tokens: padded tokens per batch.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``auto`` (bf16 on a GPU that has it, fp32 elsewhere).
    """

    side: str
    split: str | None = None
    top_k: int | None = None
    batch_tokens: int = 16384
    precision: str = "auto"


def encode(model: str | Path, shards: str | Path, output: str | Path, config: EncodeConfig, *,
           overwrite: bool = False) -> None:
    """Write the artifact of vectors ``output``; every rank calls it.

    Raises:
        InputError: model, shards or split do not exist or do not belong together, or ``output`` exists.
    """
    output = Path(output)
    with together():
        table, opened, made_with = open_inputs(model, shards, config)
        blocks.refuse_existing(output, overwrite)
    with blocks.ranks() as (rank, world, device), blocks.writing(output, rank, overwrite):
        hosts = blocks.hosts(output, shards=opened.manifest.fingerprint, model=made_with)
        name = blocks.precision(config.precision, device)
        state = {"model": made_with or str(model), "shards": opened.manifest.fingerprint, "side": config.side,
                 "split": config.split, "top_k": config.top_k, "precision": name, "block": BLOCK}
        partial, there = blocks.open_partial(output, state, hosts)
        encoder = SparseEncoder.load(model, side=config.side).to(device).eval()
        vocabularies.refuse_longer_texts(encoder, table, model)
        own = blocks.own(len(table), BLOCK, rank, world)
        missing = blocks.missing(own, there, lambda block: vectors.part_name(0, block))
        start = time.perf_counter()
        done = _encode_blocks(encoder, opened, table, missing, partial, config, blocks.PRECISIONS[name], device)
        seconds = time.perf_counter() - start
        blocks.collect(hosts, partial, -(-len(table) // BLOCK))
        if rank == 0:
            _finish(output, partial, opened, model, shards, state)
            say(f"wrote {output}: {len(table)} {config.side}, {done / max(seconds, 1e-9):.0f} texts/s on this rank")
        hosts.barrier()


def open_inputs(model: str | Path, shards: str | Path, config: EncodeConfig) -> tuple[TokenTable, Shards, str | None]:
    """The texts to encode, their shards, and the fingerprint of a model of ours; refuses what does not fit."""
    table, opened = _open_table(shards, config)
    made_with = opened.refuse_other_tokenizer(model, "model")
    if made_with is None:
        vocabularies.refuse_other_vocabulary(model, opened, config.side)
    else:
        vocabularies.warn_of_other_length(made_with, opened, config.side)
    return table, opened, made_with and made_with.fingerprint


def _open_table(shards: str | Path, config: EncodeConfig) -> tuple[TokenTable, Shards]:
    opened = Shards.open(shards)
    if config.side == "docs":
        return opened.docs, opened
    if config.split not in opened.splits:
        known = ", ".join(opened.splits) or "none"
        raise InputError(f"has no queries of the split '{config.split}'; it has {known}", shards)
    return opened.queries(config.split), opened


@torch.inference_mode()
def _encode_blocks(encoder: torch.nn.Module, shards: Shards, table: TokenTable, missing: Sequence[int], partial: Path,
                   config: EncodeConfig, dtype: torch.dtype | None, device: torch.device) -> int:
    """Encode these blocks; returns the number of texts encoded."""
    done = 0
    sizes = {b: min(BLOCK, len(table) - b * BLOCK) for b in missing}
    bar = progress(total=sum(sizes.values()), desc=f"encode {config.side}", unit="texts")
    for block in missing:
        rows = np.arange(block * BLOCK, block * BLOCK + sizes[block])
        pieces, order = [], []
        for batch in blocks.by_length(table.lengths[rows], config.batch_tokens):
            values = _forward(encoder, shards, table, rows[batch], dtype, device)
            pieces.append(vectors.quantise(values, shards.special.unk, top_k=config.top_k))
            order.append(batch)
            bar.update(len(batch))
        csr = _reorder(pieces, np.concatenate(order))
        vectors.write_part(partial / vectors.part_name(0, block), table.ids(rows), *csr, n_terms=shards.vocab_size)
        done += len(rows)
    bar.close()
    return done


def _forward(encoder: torch.nn.Module, shards: Shards, table: TokenTable, rows: np.ndarray, dtype: torch.dtype | None,
             device: torch.device) -> np.ndarray:
    """Lexicon vectors float32 [B, V] of the texts in ``rows``."""
    text = read_texts(shards, table, rows).to(device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        values = encoder(**text.arguments())
    return values[:, :shards.vocab_size].float().cpu().numpy()


def _reorder(pieces: list[vectors.Csr], order: np.ndarray) -> vectors.Csr:
    """Rows of ``pieces``, of which row ``i`` is text ``order[i]``, put into the order of the texts."""
    _, csr = vectors.join([([""] * (len(piece.indptr) - 1), piece) for piece in pieces])
    back = np.argsort(order, kind="stable")
    counts = np.diff(csr.indptr)[back]
    ends = np.cumsum(counts)
    take = np.repeat(csr.indptr[:-1][back] - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
    return vectors.Csr(np.concatenate([np.zeros(1, np.int64), ends]), csr.indices[take], csr.weights[take])


def _finish(output: Path, partial: Path, shards: Shards, model: str | Path, source: str | Path, state: dict) -> None:
    vectors.write_vocabulary(partial, shards.vocabulary())
    draft = artifact.Draft(partial)
    vectors.describe(draft, side=state["side"], split=state["split"], top_k=state["top_k"],
                     **vocabularies.facts(shards, state["side"]))
    blocks.finished(partial)
    artifact.seal(draft, output, vectors.KIND, inputs={"model": model, "shards": source}, config=state)
