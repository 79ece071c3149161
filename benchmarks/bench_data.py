#!/usr/bin/env python
"""Random access to tokenised passages: padded batches of our shards against Hugging Face datasets and Arrow `take`.

    python benchmarks/bench_data.py [--rows 200000] [--batch 256] [--batches 200]

All read the same synthetic rows (100 to 144 tokens of 16 bits) and return one padded int64 array. Printed: samples per
second on one core, the best of three rounds, and the ratio to the first line. `tokens()` is the read without padding.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from lexmae.data.tokens import TableWriter, TokenTable


def main() -> None:
    """Write the rows once in each form, then time random batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=200)
    args = parser.parse_args()
    pa.set_cpu_count(1)
    random = np.random.default_rng(0)
    lengths = random.integers(100, 145, args.rows)
    values = random.integers(5, 30522, int(lengths.sum())).astype(np.uint16)
    drawn = random.integers(0, args.rows, (args.batches, args.batch))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        readers = {**ours(folder, values, lengths), **arrow_take(folder, values, lengths)}
        readers |= hf_datasets(folder, values, lengths)
        speeds = {name: speed(read, drawn) for name, read in readers.items()}
    first = next(iter(speeds.values()))
    for name, samples in speeds.items():
        print(f"{name:42s} {samples:12,.0f} samples/s   {samples / first:8.4f}")


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


def speed(read: Callable, drawn: np.ndarray, rounds: int = 3, seconds: float = 5.0) -> float:
    """Samples per second of the best round; a slow reader stops at the time limit."""
    best = 0.0
    for _ in range(rounds):
        start, done = time.perf_counter(), 0
        for rows in drawn:
            read(rows)
            done += len(rows)
            if time.perf_counter() - start > seconds:
                break
        best = max(best, done / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
