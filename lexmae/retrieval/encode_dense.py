"""Encodes the texts of shards into dense vectors: each rank its own blocks, restartable block by block.

Blocks, ranks and restarts are those of ``encode.py``. A block is one ``part-NNNNN.npy`` until the end, when rank 0
joins them into one matrix.

Shapes: B sequences, H hidden size, R texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lexmae import artifact
from lexmae.cli import progress, say
from lexmae.data.batches import read_texts
from lexmae.data.shards import Shards, TokenTable
from lexmae.errors import InputError
from lexmae.model.dense import DenseEncoder
from lexmae.ranks import together
from lexmae.renaming import reserve
from lexmae.retrieval import blocks, dense, vocabularies
from lexmae.retrieval import encode as sparse
from lexmae.retrieval.encode import EncodeConfig


def encode(model: str | Path, shards: str | Path, output: str | Path, config: EncodeConfig, representation: str, *,
           overwrite: bool = False) -> None:
    """Write the artifact of dense vectors ``output``; every rank calls it.

    Args:
        representation: ``bottleneck`` or ``cls``.

    Raises:
        InputError: model, shards or split do not exist or do not belong together, or ``output`` exists.
    """
    if config.top_k is not None:
        raise InputError("top-k is for lexicon vectors: dense ones have no terms to leave out")
    output = Path(output)
    with together():
        table, opened, made_with = sparse.open_inputs(model, shards, config)
        blocks.refuse_existing(output, overwrite)
    with blocks.ranks() as (rank, world, device), blocks.writing(output, rank, overwrite):
        hosts = blocks.hosts(output, shards=opened.manifest.fingerprint, model=made_with)
        name = blocks.precision(config.precision, device)
        state = {"model": made_with or str(model), "shards": opened.manifest.fingerprint, "side": config.side,
                 "split": config.split, "representation": representation, "precision": name, "block": sparse.BLOCK}
        partial, there = blocks.open_partial(output, state, hosts)
        encoder = DenseEncoder.load(model, representation).to(device).eval()
        vocabularies.refuse_longer_texts(encoder, table, model)
        own = blocks.own(len(table), sparse.BLOCK, rank, world)
        missing = blocks.missing(own, there, part_name)
        _encode_blocks(encoder, opened, table, missing, partial, config, blocks.PRECISIONS[name], device)
        blocks.collect(hosts, partial, -(-len(table) // sparse.BLOCK))
        if rank == 0:
            _finish(output, partial, opened, table, encoder.dimensions, {"model": model, "shards": shards}, state)
            say(f"wrote {output}: {len(table)} {config.side} of {encoder.dimensions} dimensions ({representation})")
        hosts.barrier()


def part_name(number: int) -> str:
    """File name of the vectors of a block."""
    return f"part-{number:05d}.npy"


@torch.inference_mode()
def _encode_blocks(encoder: DenseEncoder, shards: Shards, table: TokenTable, missing: Sequence[int], partial: Path,
                   config: EncodeConfig, dtype: torch.dtype | None, device: torch.device) -> None:
    """Encode the blocks whose part is missing."""
    sizes = {b: min(sparse.BLOCK, len(table) - b * sparse.BLOCK) for b in missing}
    with progress(total=sum(sizes.values()), desc=f"encode {config.side}", unit="texts") as bar:
        for block in missing:
            rows = np.arange(block * sparse.BLOCK, block * sparse.BLOCK + sizes[block])
            found = np.empty((len(rows), encoder.dimensions), np.float32)
            for batch in blocks.by_length(table.lengths[rows], config.batch_tokens):
                text = read_texts(shards, table, rows[batch]).to(device)
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    values = encoder(**text.arguments())
                found[batch] = values.float().cpu().numpy()
                bar.update(len(batch))
            _refuse_bad(found, rows, table)
            with artifact.atomic_file(partial / part_name(block), "wb") as out:
                np.save(out, found)


def _refuse_bad(found: np.ndarray, rows: np.ndarray, table: TokenTable) -> None:
    good = np.isfinite(found).all(axis=1)
    if not good.all():
        name = table.ids(rows[[int(np.argmin(good))]])[0]
        raise InputError(f"the model gives '{name}' a vector that is not finite; try --precision fp32")


def _finish(output: Path, partial: Path, shards: Shards, table: TokenTable, dimensions: int,
            inputs: dict[str, str | Path], state: dict) -> None:
    """Join the parts into one matrix; a run that is stopped here joins them again."""
    rows = len(table)
    files = [partial / part_name(b) for b in blocks.own(rows, sparse.BLOCK, 0, 1)]
    unfinished = partial / f".{dense.MATRIX}"
    matrix = np.lib.format.open_memmap(unfinished, "w+", np.float32, (rows, dimensions)) if rows else None
    if matrix is not None:
        reserve(unfinished)
    for number, file in enumerate(files):
        matrix[number * sparse.BLOCK:(number + 1) * sparse.BLOCK] = np.load(file, mmap_mode="r")
    if matrix is None:
        with open(unfinished, "wb") as out:
            np.save(out, np.zeros((0, dimensions), np.float32))
    else:
        matrix.flush()
    unfinished.rename(partial / dense.MATRIX)
    dense.write_ids(partial / dense.IDS, table.ids())
    for file in files:
        file.unlink()
    draft = artifact.Draft(partial)
    dense.describe(draft, rows, dimensions, representation=state["representation"], side=state["side"],
                   split=state["split"], **vocabularies.facts(shards, state["side"]))
    blocks.finished(partial)
    artifact.seal(draft, output, dense.KIND, inputs=inputs, config=state)
