"""Encodes the texts of shards into sparse vectors: each rank its own blocks, restartable block by block.

The texts are cut into blocks of fixed size, whatever the number of ranks; block ``i`` belongs to rank ``i mod world``
and becomes one part file. A run that was stopped goes on with the blocks that are missing, also on another number of
ranks, and the result is the same.

Shapes: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lexmae import artifact, lifeline
from lexmae.cli import is_main_rank, progress, say
from lexmae.data.batches import read_texts
from lexmae.data.shards import Shards, TokenTable
from lexmae.errors import InputError
from lexmae.model.encoder import SparseEncoder
from lexmae.ranks import Hosts, several_hosts, together
from lexmae.retrieval import vectors

BLOCK = 4096  # texts per part
_STATE = "encode.json"
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        table, opened = _open_table(shards, config)
        made_with = _refuse_other_tokenizer(model, opened)
        if is_main_rank() or not several_hosts():
            artifact.refuse_existing(output, overwrite)
    with _ranks() as (rank, world, device):
        hosts = Hosts(output.parent)
        hosts.refuse_difference(shards=opened.manifest.fingerprint, model=made_with or "not one of lexmae's")
        name = _precision(config.precision, device)
        state = {"model": made_with or str(model), "shards": opened.manifest.fingerprint, "side": config.side,
                 "split": config.split, "top_k": config.top_k, "precision": name, "block": BLOCK}
        partial = _partial(output, state, hosts.leads)
        hosts.barrier()
        there = hosts.agree({file.name for file in partial.glob("part-*.arrow")})
        encoder = SparseEncoder.load(model).to(device).eval()
        blocks = [i for i in range(-(-len(table) // BLOCK)) if i % world == rank]
        start = time.perf_counter()
        missing = [b for b in blocks if vectors.part_name(0, b) not in there
                   and not (partial / vectors.part_name(0, b)).exists()]
        done = _encode_blocks(encoder, opened, table, blocks, missing, partial, config, _PRECISIONS[name], device)
        seconds = time.perf_counter() - start
        hosts.barrier()
        hosts.collect(partial, [file.name for file in partial.glob("part-*.arrow")])
        if rank == 0:
            _finish(output, partial, opened, model, shards, state, len(table))
            say(f"wrote {output}: {len(table)} {config.side}, {done / max(seconds, 1e-9):.0f} texts/s on this rank")
        elif hosts.leads:
            shutil.rmtree(partial)
        hosts.barrier()


def _open_table(shards: str | Path, config: EncodeConfig) -> tuple[TokenTable, Shards]:
    opened = Shards.open(shards)
    if config.side == "docs":
        return opened.docs, opened
    if config.split not in opened.splits:
        known = ", ".join(opened.splits) or "none"
        raise InputError(f"has no queries of the split '{config.split}'; it has {known}", shards)
    return opened.queries(config.split), opened


def _refuse_other_tokenizer(model: str | Path, shards: Shards) -> str | None:
    """The fingerprint of a model of ours, whose tokenizer must be that of the shards; None for other models."""
    if not artifact.exists(model):
        return None
    manifest = artifact.read(model, "model")
    if manifest.extra["tokenizer_hash"] != shards.manifest.extra["tokenizer_hash"]:
        raise InputError(f"was trained with another tokenizer than that of {shards.manifest.path}", model)
    return manifest.fingerprint


@contextlib.contextmanager
def _ranks() -> Iterator[tuple[int, int, torch.device]]:
    """This process's rank, the number of ranks, and its device; ranks only ever wait for each other."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        lifeline.begin()
    try:
        yield rank, world, device
    except Exception as error:
        lifeline.blame(error)
    finally:
        lifeline.end()
        if world > 1:
            torch.distributed.destroy_process_group()


def _precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _partial(output: Path, state: dict, leads: bool) -> Path:
    """The unfinished artifact to go on with, emptied where it was begun from other inputs or settings."""
    partial = artifact.partial_path(output)
    if leads:
        begun = partial / _STATE
        if partial.exists() and (not begun.is_file() or json.loads(begun.read_text(encoding="utf-8")) != state):
            say(f"{partial} was begun from other inputs: starting again")
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        for unfinished in partial.glob(".*"):  # what a killed run was writing
            unfinished.unlink()
        with artifact.atomic_file(begun) as out:
            json.dump(state, out)
    return partial


@torch.inference_mode()
def _encode_blocks(encoder: SparseEncoder, shards: Shards, table: TokenTable, blocks: Sequence[int],
                   missing: Sequence[int], partial: Path, config: EncodeConfig, dtype: torch.dtype | None,
                   device: torch.device) -> int:
    """Encode the blocks whose part is missing; returns the number of texts encoded."""
    if len(missing) < len(blocks):
        say(f"{len(blocks) - len(missing)} of {len(blocks)} parts are there already")
    done = 0
    sizes = {b: min(BLOCK, len(table) - b * BLOCK) for b in missing}
    bar = progress(total=sum(sizes.values()), desc=f"encode {config.side}", unit="texts")
    for block in missing:
        rows = np.arange(block * BLOCK, block * BLOCK + sizes[block])
        pieces, order = [], []
        for batch in _by_length(table.lengths[rows], config.batch_tokens):
            values = _forward(encoder, shards, table, rows[batch], dtype, device)
            pieces.append(vectors.quantise(values, shards.special.unk, top_k=config.top_k))
            order.append(batch)
            bar.update(len(batch))
        csr = _reorder(pieces, np.concatenate(order))
        vectors.write_part(partial / vectors.part_name(0, block), table.ids(rows), *csr, n_terms=shards.vocab_size)
        done += len(rows)
    bar.close()
    return done


def _by_length(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Positions in batches of similar length, longest first, each at most ``batch_tokens`` with padding."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        yield order[start:start + size]
        start += size


def _forward(encoder: SparseEncoder, shards: Shards, table: TokenTable, rows: np.ndarray, dtype: torch.dtype | None,
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


def _finish(output: Path, partial: Path, shards: Shards, model: str | Path, source: str | Path, state: dict,
            rows: int) -> None:
    missing = [b for b in range(-(-rows // BLOCK)) if not (partial / vectors.part_name(0, b)).exists()]
    if missing:
        raise InputError(f"{len(missing)} parts are missing, {vectors.part_name(0, missing[0])} first; "
                         "the same command again makes them", partial)
    vectors.write_vocabulary(partial, shards.vocabulary())
    draft = artifact.Draft(partial)
    vectors.describe(draft, side=state["side"], split=state["split"], top_k=state["top_k"],
                     tokenizer_hash=shards.manifest.extra["tokenizer_hash"])
    (partial / _STATE).unlink()
    artifact.seal(draft, output, vectors.KIND, inputs={"model": model, "shards": source}, config=state)
