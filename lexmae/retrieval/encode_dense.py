"""Encodes the texts of shards into dense vectors: each rank its own blocks, restartable block by block.

Blocks, ranks and restarts are those of ``encode.py``. A block is one ``part-NNNNN.npy`` until the end, when rank 0
joins them into one matrix.

Shapes: B sequences, H hidden size, R texts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from lexmae import artifact
from lexmae.cli import say
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
        representation: ``bottleneck``, ``cls`` or ``mean``.

    Raises:
        InputError: model, shards or split do not exist or do not belong together, or ``output`` exists.
    """
    if config.top_k is not None or config.threshold is not None:
        raise InputError("top-k and threshold are for lexicon vectors: dense ones have no terms to leave out")
    output = Path(output)
    with together() as held:
        table, opened, content = sparse.open_inputs(model, shards, config, representation)
        blocks.refuse_existing(output, overwrite)
        held.enter_context(blocks.writing(output, overwrite))
    with held, blocks.ranks() as (rank, world, device):
        config = blocks.with_batch_tokens(config, device)
        hosts = blocks.hosts(output, shards=opened.manifest.fingerprint, model=content)
        name = blocks.precision(config.precision, device)
        state = {"model": content or str(model), "shards": opened.manifest.fingerprint, "side": config.side,
                 "split": config.split, "representation": representation, "precision": name, "block": sparse.BLOCK}
        partial, there = blocks.open_partial(output, state, hosts)
        encoder = DenseEncoder.load(model, representation, side=config.side).to(device).eval()
        vocabularies.refuse_longer_texts(encoder, table, model)
        own = blocks.own(len(table), sparse.BLOCK, rank, world)
        missing = blocks.missing(own, there, part_name)
        _DenseJob(encoder, opened, table, partial, config).run(missing, device, blocks.PRECISIONS[name])
        blocks.collect(hosts, partial, -(-len(table) // sparse.BLOCK))
        if rank == 0:
            _finish(output, partial, opened, table, encoder.dimensions, {"model": model, "shards": shards}, state)
            say(f"wrote {output}: {len(table)} {config.side} of {encoder.dimensions} dimensions ({representation})")
        hosts.barrier()


def part_name(number: int) -> str:
    """File name of the vectors of a block."""
    return f"part-{number:05d}.npy"


class _DenseJob(sparse.TextJob):
    """Dense vectors, one matrix for each block."""

    def select(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.float(),

    def receive(self, block: int, batch: np.ndarray, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        return arrays[0].copy()

    def write(self, block: int, batches: list[np.ndarray], kept: list[np.ndarray]) -> None:
        found = np.empty((len(self.rows(block)), self.encoder.dimensions), np.float32)
        found[np.concatenate(batches)] = np.concatenate(kept)
        self.refuse_bad(self.rows(block), np.isfinite(found).all(axis=1))
        with artifact.atomic_file(self.partial / part_name(block), "wb") as out:
            np.save(out, found)


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
    draft = artifact.Draft(partial, scaffold=[*(file.name for file in files), blocks.STATE])
    dense.describe(draft, rows, dimensions, representation=state["representation"], side=state["side"],
                   split=state["split"], **vocabularies.facts(shards, state["side"]))
    artifact.seal(draft, output, dense.KIND, inputs=inputs, config=state)
