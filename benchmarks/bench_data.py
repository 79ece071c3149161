#!/usr/bin/env python
"""Random access to tokenised passages: padded batches of our shards against Hugging Face datasets and Arrow `take`.

    python benchmarks/bench_data.py [--input FOLDER] [--rows 200000] [--batch 256] [--batches 200]

All read the same rows, real text in MS MARCO's lengths (the tokens of the collection, as often as they are needed), and
give one padded int64 array; the arrays are compared first. One core. `tokens()` is the read without padding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import common
import numpy as np
import pyarrow as pa
import torch

from lexmae.data.corpus import Corpus
from lexmae.data.tokens import TableWriter, TokenTable

TEXTS = 10_000  # passages that are tokenised


def main() -> None:
    """Write the rows once in each form, compare, then time random batches in turn."""
    args = common.make_parser(__doc__, rows=200_000, batch=256, batches=200).parse_args()
    pa.set_cpu_count(1)
    torch.set_num_threads(1)
    lengths = common.draw_lengths(args.rows)
    drawn = np.random.default_rng(0).integers(0, args.rows, (args.batches, args.batch))
    with tempfile.TemporaryDirectory() as folder:
        values = tokens(args.input, int(lengths.sum()), Path(folder))
        readers = {**ours(folder, values, lengths), **hf_datasets(folder, values, lengths),
                   **arrow_take(folder, values, lengths)}
        compare(readers, drawn[0])
        sides = [common.Side(name, lambda read=read: [read(rows) for rows in drawn], drawn.size, "samples/s")
                 for name, read in readers.items()]
        figures = common.in_turn(sides, args.rounds, "cpu")
    common.report("batches from shards", figures, args, rows=args.rows, batch=args.batch, batches=args.batches,
                  mean_tokens=round(float(lengths.mean()), 1))


def tokens(source: str | None, count: int, folder: Path) -> np.ndarray:
    """``count`` token ids of real text, uint16: a collection's first passages over and over."""
    source = common.source(source, folder)
    words = common.wordpiece(source)
    passages = [passage.text for passage in islice(Corpus.open(source).passages(), TEXTS)]
    read = words(passages, add_special_tokens=False)["input_ids"]
    return np.resize(np.fromiter((i for ids in read for i in ids), np.uint16), count)


def compare(readers: dict[str, Callable], rows: np.ndarray) -> None:
    """Exit where a reader gives another batch."""
    first, *others = [padded(read(rows)) for read in readers.values()]
    common.refuse_difference("batches", float(not all(np.array_equal(first, other) for other in others)), 0)


def padded(batch: np.ndarray | list[np.ndarray]) -> np.ndarray:
    """A batch of any reader as one int64 array."""
    return pad(batch) if isinstance(batch, list) else batch


def ours(folder: str, values: np.ndarray, lengths: np.ndarray) -> dict[str, Callable]:
    """Token tables: padded batches, and bare views."""
    writer = TableWriter(folder, "docs", np.uint16)
    writer.append([f"d{i}" for i in range(len(lengths))], values, lengths, lengths)
    writer.close()
    table = TokenTable(folder, "docs")
    return {
        "shards: pad_batch": lambda rows: table.pad_batch(rows, 0).ids,
        "shards: tokens(), views without padding": lambda rows: [table.tokens(row) for row in rows.tolist()],
    }


def arrow_take(folder: str, values: np.ndarray, lengths: np.ndarray) -> dict[str, Callable]:
    """`take` on a memory-mapped Arrow table in chunks of 1000 rows, as `datasets` writes them."""
    path = f"{folder}/take.arrow"
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    whole = pa.table({"tokens": pa.ListArray.from_arrays(offsets, pa.array(values))})
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=1000)
    column = pa.ipc.open_file(pa.memory_map(path)).read_all().column("tokens")
    return {"Arrow take": lambda rows: pad([row.values.to_numpy() for row in column.take(pa.array(rows))])}


def hf_datasets(folder: str, values: np.ndarray, lengths: np.ndarray) -> dict[str, Callable]:
    """`datasets`, in the numpy format, by row and by batch."""
    import datasets

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    column = pa.table({"tokens": pa.ListArray.from_arrays(offsets, pa.array(values))})
    datasets.disable_progress_bars()
    datasets.Dataset(column).save_to_disk(f"{folder}/hf")
    stored = datasets.load_from_disk(f"{folder}/hf").with_format("numpy")
    return {
        "datasets: rows one by one": lambda rows: pad([stored[row]["tokens"] for row in rows.tolist()]),
        "datasets: a batch of rows": lambda rows: pad(stored[rows.tolist()]["tokens"]),
    }


def pad(rows: list[np.ndarray]) -> np.ndarray:
    """Rows as one int64 array, padded with 0."""
    batch = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for place, row in enumerate(rows):
        batch[place, : len(row)] = row
    return batch


if __name__ == "__main__":
    main()
