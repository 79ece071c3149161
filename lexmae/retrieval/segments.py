"""Segments of the exact index on disk: inverted, in blocks of documents; written by threads, read by memory map.

Shapes: D documents of a segment, V vocabulary, P postings, G blocks.

The documents of a segment stand in the order of their ids; block g holds the documents ``[g·BLOCK, (g + 1)·BLOCK)``.
A folder ``segment-NNNN`` holds ``ids.arrow``; ``starts.npy`` int64 [G, V+1]: the postings of term v in block g are
``starts[g, v]:starts[g, v + 1]``; ``postings.npy`` uint32 [P], ``weight · 2¹⁶ + document within the block``;
``heaviest.npy`` uint16 [V], the largest weight of each term; and where documents were deleted, ``deleted.npy`` int32,
their numbers, ascending. Deleted documents keep their postings until the index is compacted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lexmae.checked import check_offsets, check_range, read_array, read_arrow
from lexmae.cli import progress
from lexmae.errors import InputError
from lexmae.renaming import reserve
from lexmae.retrieval.engines import default_threads
from lexmae.retrieval.kernels import forward, frozen, invert
from lexmae.retrieval.stored import StoredVectors
from lexmae.retrieval.vectors import Csr

BLOCK = 1 << 15  # 128 KiB of accumulators: half a second-level cache or less
DELETED = "deleted.npy"
_IDS = pa.schema([("id", pa.large_string())])


def segment_name(number: int) -> str:
    """Folder of segment ``number`` within the index."""
    return f"segment-{number:04d}"


def write(vectors: StoredVectors, folder: Path, threads: int | None = None, block: int = BLOCK) -> None:
    """Write a segment; the same bytes for any number of threads.

    The sizes of the blocks are known from the lengths of the rows, so each thread takes a block, copies its rows,
    and writes its stretch of the file. Memory: the ids, a few numbers a document, and a block for each thread.
    """
    folder.mkdir()
    order, n_terms = vectors.order, len(vectors.vocabulary)
    bounds = list(range(0, max(len(order), 1), block))
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(vectors.counts[order])])
    starts = _create(folder / "starts.npy", np.int64, (len(bounds), n_terms + 1))
    postings = _create(folder / "postings.npy", np.uint32, (vectors.n_postings,))

    def write_block(number: int) -> np.ndarray:
        heaviest = np.zeros(n_terms, np.uint16)
        rows = vectors.take(order[bounds[number]:bounds[number] + block])
        invert(*rows, ends[bounds[number]], starts[number], postings, heaviest)
        return heaviest

    heaviest = np.zeros(n_terms, np.uint16)
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        for found in progress(pool.map(write_block, range(len(bounds))), total=len(bounds), desc="index", unit="block"):
            np.maximum(heaviest, found, out=heaviest)
    np.save(folder / "heaviest.npy", heaviest)
    table = pa.table({"id": vectors.id_array.take(order)})
    with pa.OSFile(str(folder / "ids.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)


def _create(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A new array of zeros on disk, mapped; an empty one, which cannot be mapped, is written at once."""
    if 0 in shape:
        np.save(path, np.zeros(shape, dtype))
        return np.zeros(shape, dtype)
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    reserve(path)
    return np.asarray(mapped).view(np.ndarray)


class Segment:
    """A segment, memory-mapped.

    Attributes:
        ids: Arrow array [D]; starts, postings, heaviest: as on disk; live: bool [D], what is not deleted.
        block: documents of a block.
    """

    def __init__(self, folder: Path, block: int = BLOCK):
        self.block = block
        batches = read_arrow(folder / "ids.arrow", _IDS)
        self.ids: pa.Array = pa.concat_arrays([pa.array([], _IDS.field("id").type), *(b.column("id") for b in batches)])
        self.starts, self.postings = (frozen(read_array(folder / name, kind, axes)) for name, kind, axes in (
            ("starts.npy", np.int64, 2), ("postings.npy", np.uint32, 1)))
        self.heaviest = read_array(folder / "heaviest.npy", np.uint16)
        self._check(folder)
        self.live = np.ones(len(self.ids), bool)
        if (folder / DELETED).exists():
            deleted = read_array(folder / DELETED, np.int32)
            self.live[check_range(deleted, len(self.ids), folder / DELETED, "numbers")] = False

    def _check(self, folder: Path) -> None:
        """Compiled loops follow these numbers without looking."""
        blocks = max(1, -(-len(self.ids) // self.block))
        if self.starts.shape != (blocks, len(self.heaviest) + 1):
            raise InputError(f"has the shape {self.starts.shape}, {len(self.ids)} documents and {len(self.heaviest)} "
                             f"terms need {(blocks, len(self.heaviest) + 1)}", folder / "starts.npy")
        whole = np.concatenate([self.starts[:, :-1].ravel(), self.starts[-1, -1:]])
        check_offsets(whole, len(self.postings), folder / "starts.npy")
        if (self.starts[1:, 0] != self.starts[:-1, -1]).any():
            raise InputError("the blocks do not join", folder / "starts.npy")
        for number, starts in enumerate(self.starts):
            within = self.postings[starts[0]:starts[-1]] & np.uint32(0xFFFF)
            check_range(within, min(self.block, len(self.ids) - number * self.block), folder / "postings.npy",
                        "document numbers")

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self) -> Iterator[Csr]:
        """Block by block, the rows of the documents that are not deleted, in the order of their ids."""
        for number, starts in enumerate(self.starts):
            live = self.live[number * self.block:(number + 1) * self.block]
            yield rows_of_block(starts, self.postings, np.where(live, np.cumsum(live) - 1, -1), int(live.sum()))


def rows_of_block(starts: np.ndarray, postings: np.ndarray, slots: np.ndarray, n_rows: int) -> Csr:
    """The postings of a block turned back: document d as row ``slots[d]`` of ``n_rows``, or nowhere where -1."""
    slots = slots.astype(np.int64)
    n = forward(starts, postings, slots, np.zeros(n_rows + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.uint16))
    rows = Csr(np.zeros(n_rows + 1, np.int64), np.empty(n, np.int32), np.empty(n, np.uint16))
    forward(starts, postings, slots, *rows)
    return rows


def open_segments(path: Path, block: int = BLOCK) -> list[Segment]:
    """All segments of an index, in order. InputError where there is none."""
    folders = sorted(path.glob("segment-*"))
    if not folders:
        raise InputError("was made by an older version; index the vectors again with tools/index.py", path)
    return [Segment(folder, block) for folder in folders]


def number_documents(segments: Iterable[Segment]) -> tuple[pa.Array, list[np.ndarray]]:
    """Number the documents that are not deleted in the order of their ids.

    Returns:
        their ids in that order, and for each segment int32 [D], the numbers of its documents, -1 for a deleted one.
    """
    segments = list(segments)
    if len(segments) == 1 and segments[0].live.all():
        return segments[0].ids, [np.arange(len(segments[0]), dtype=np.int32)]
    live = np.concatenate([segment.live for segment in segments])
    ids = pa.concat_arrays([segment.ids for segment in segments]).filter(pa.array(live))
    order = pc.array_sort_indices(ids).to_numpy().astype(np.int64)
    numbers = np.full(len(live), -1, np.int32)
    numbers[np.flatnonzero(live)[order]] = np.arange(len(ids), dtype=np.int32)
    return ids.take(order), np.split(numbers, np.cumsum([len(segment) for segment in segments])[:-1])
