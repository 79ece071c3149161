"""A table of tokenised texts on disk: memory-mapped, read by row or by id without copying.

Shapes: B rows asked for, L tokens of the longest of them.

A table `docs` is the files `docs-00000.arrow`, `docs-00001.arrow`, … (Arrow IPC files; columns `id`,
`tokens`, `first_length`) and `lookup-docs.arrow` (sorted 64-bit hashes of the ids and the rows they stand
for). Numpy arrays look straight into the mapped buffers; no Arrow object is made per row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from lexmae.checked import check_range, read_arrow
from lexmae.errors import InputError

SHARD_ROWS = 500_000
_SCHEMAS = tuple(pa.schema([("id", pa.large_string()), ("tokens", pa.list_(dtype)), ("first_length", pa.uint16())])
                 for dtype in (pa.uint16(), pa.uint32()))
_LOOKUP = pa.schema([("hash", pa.uint64()), ("row", pa.int64())])
_SHARD_TOKENS = 2**31 - 1  # offsets of an Arrow list are 32-bit


@dataclass(frozen=True)
class TokenBatch:
    """Padded rows: ids int64 [B, L]; lengths and first_lengths (of the first segment, specials included)
    int64 [B].
    """

    ids: np.ndarray
    lengths: np.ndarray
    first_lengths: np.ndarray


@dataclass(frozen=True)
class _Piece:
    """One record batch as numpy views: row `i` has tokens `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray
    id_bytes: np.ndarray
    id_offsets: np.ndarray
    first: np.ndarray


class TokenTable:
    """Rows of token ids with their text's id. Picklable: another process opens the same files."""

    def __init__(self, folder: str | Path, name: str, what: str = "document") -> None:
        """Open table `name` of a folder; `what` is the word for a row in error messages."""
        self.folder, self.name, self.what = Path(folder), name, what
        files = sorted(self.folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].arrow"))
        if not files:
            raise InputError(f"no token files {name}-*.arrow", path=self.folder)
        self._pieces = [piece for file in files for piece in _read_pieces(file)]
        sizes = [len(piece.first) for piece in self._pieces]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __reduce__(self):
        return TokenTable, (self.folder, self.name, self.what)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of every row, int32 [rows]."""
        return np.concatenate([np.diff(piece.offsets).astype(np.int32) for piece in self._pieces])

    def tokens(self, row: int) -> np.ndarray:
        """The token ids of a row: a read-only view of the file, uint16 or uint32."""
        piece, local = self._locate(row)
        return piece.values[piece.offsets[local] : piece.offsets[local + 1]]

    def first_length(self, row: int) -> int:
        """Length of the row's first segment, special tokens included."""
        piece, local = self._locate(row)
        return int(piece.first[local])

    def id(self, row: int) -> str:
        """The id of a row."""
        piece, local = self._locate(row)
        return piece.id_bytes[piece.id_offsets[local] : piece.id_offsets[local + 1]].tobytes().decode()

    def ids(self, rows: Sequence[int] | np.ndarray | None = None) -> list[str]:
        """The ids of some rows, or of all rows in order."""
        if rows is not None:
            return [self.id(row) for row in np.asarray(rows, np.int64).tolist()]
        found: list[str] = []
        for piece in self._pieces:
            data, ends = piece.id_bytes.tobytes(), piece.id_offsets.tolist()
            found.extend(data[a:b].decode() for a, b in zip(ends, ends[1:], strict=False))
        return found

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64; InputError names the first id that the table does not hold."""
        found = self._find(ids)
        missing = np.flatnonzero(found < 0)
        if len(missing):
            raise InputError(f"unknown {self.what} {ids[missing[0]]!r}", path=self.folder)
        return found

    def contains(self, ids: Sequence[str]) -> np.ndarray:
        """Which of the ids the table holds, bool."""
        return self._find(ids) >= 0

    def pad_batch(self, rows: Sequence[int] | np.ndarray, pad_id: int) -> TokenBatch:
        """The given rows, padded with `pad_id` to the longest of them."""
        rows = self._checked(rows)
        lengths = self.lengths[rows].astype(np.int64)
        ids = np.full((len(rows), int(lengths.max(initial=0))), pad_id, np.int64)  # [B, L]
        first_lengths = np.empty(len(rows), np.int64)
        for piece, places, local in self._by_piece(rows):
            first_lengths[places] = piece.first[local]
            starts = piece.offsets[local].tolist()
            values = piece.values
            for place, start, length in zip(places.tolist(), starts, lengths[places].tolist(), strict=True):
                ids[place, :length] = values[start : start + length]
        return TokenBatch(ids, lengths, first_lengths)

    def check_tokens(self, vocab_size: int) -> None:
        """Compare every token id with the vocabulary. InputError names the first row that holds another one."""
        for number, piece in enumerate(self._pieces):
            used = piece.values[piece.offsets[0] : piece.offsets[-1]]
            if len(used) and int(used.max()) >= vocab_size:
                place = int(np.argmax(used >= vocab_size))
                local = np.searchsorted(piece.offsets, place + piece.offsets[0], side="right") - 1
                row = int(self._starts[number] + local)
                raise InputError(f"{self.what} {self.id(row)!r} holds the token {used[place]}, but the vocabulary has "
                                 f"{vocab_size} entries", path=self.folder)  # fmt: skip

    def document_frequency(self, vocab_size: int, chunk: int = 8192) -> np.ndarray:
        """How many rows hold each token id, int64 [vocab_size]."""
        counts = np.zeros(vocab_size + 1, np.int64)
        for start in range(0, len(self), chunk):
            rows = np.arange(start, min(start + chunk, len(self)))
            ids = np.sort(self.pad_batch(rows, vocab_size).ids, axis=1)  # padding counts as one more token
            first = np.ones(ids.shape, bool)
            first[:, 1:] = ids[:, 1:] != ids[:, :-1]
            counts += np.bincount(ids[first], minlength=vocab_size + 1)
        return counts[:vocab_size]

    def _locate(self, row: int) -> tuple[_Piece, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a table of {len(self)}")
        if len(self._pieces) == 1:
            return self._pieces[0], row
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._pieces[number], int(row - self._starts[number])

    def _checked(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a table of {len(self)}")
        return rows

    def _by_piece(self, rows: np.ndarray) -> Iterator[tuple[_Piece, np.ndarray, np.ndarray]]:
        """The rows grouped by piece: the piece, places within `rows`, row numbers within the piece."""
        number = np.searchsorted(self._starts, rows, side="right") - 1
        for i in np.unique(number).tolist():
            places = np.flatnonzero(number == i)
            yield self._pieces[i], places, rows[places] - self._starts[i]

    @cached_property
    def _lookup(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted hashes uint64 [rows] and the row of each, both mapped."""
        path = self.folder / f"lookup-{self.name}.arrow"
        batches = read_arrow(path, _LOOKUP)
        if len(batches) != 1 or len(batches[0]) != len(self):
            raise InputError(f"does not belong to a table of {len(self)} rows", path=path)
        return batches[0].column("hash").to_numpy(), check_range(batches[0].column("row").to_numpy(), len(self), path,
                                                                 "rows")

    def _find(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, -1 where there is none. Equal hashes are told apart by the ids themselves."""
        encoded = [name.encode() for name in ids]
        wanted = hash_ids(encoded)
        hashes, rows = self._lookup
        found = np.full(len(ids), -1, np.int64)
        place = np.searchsorted(hashes, wanted)
        open_ = np.arange(len(ids))
        while True:
            open_ = open_[place[open_] < len(hashes)]
            open_ = open_[hashes[place[open_]] == wanted[open_]]
            if not len(open_):
                return found
            candidates = rows[place[open_]]
            same = self._same_ids(candidates, [encoded[i] for i in open_.tolist()])
            found[open_[same]] = candidates[same]
            open_ = open_[~same]
            place[open_] += 1

    def _same_ids(self, rows: np.ndarray, names: list[bytes]) -> np.ndarray:
        """Whether each row has the id `names[i]`, compared byte by byte, all rows at once."""
        sizes = np.fromiter(map(len, names), np.int64, len(names))
        ends = np.cumsum(sizes)
        given = np.frombuffer(b"".join(names), np.uint8)
        same = np.zeros(len(rows), bool)
        for piece, places, local in self._by_piece(rows):
            stored = piece.id_offsets[local]
            equal = piece.id_offsets[local + 1] - stored == sizes[places]
            places, stored = places[equal], stored[equal]
            same[places] = True
            which = np.repeat(np.arange(len(places)), sizes[places])
            within = np.arange(len(which)) - np.repeat(
                np.cumsum(sizes[places]) - sizes[places], sizes[places]
            )
            start = ends[places] - sizes[places]
            differs = piece.id_bytes[stored[which] + within] != given[start[which] + within]
            same[places[which[differs]]] = False
        return same


class TableWriter:
    """Writes a table: rows are gathered and written as one large record batch per file."""

    def __init__(self, folder: str | Path, name: str, dtype: np.dtype, shard_rows: int = SHARD_ROWS) -> None:
        self.folder, self.name, self.dtype, self.shard_rows = Path(folder), name, np.dtype(dtype), shard_rows
        self.rows = self._files = self._held_rows = self._held_tokens = 0
        self._chunks: list[tuple[list[str], np.ndarray, np.ndarray, np.ndarray]] = []
        self._hashes: list[np.ndarray] = []

    def append(self, ids: list[str], values: np.ndarray, lengths: np.ndarray, first: np.ndarray) -> None:
        """Add rows: their tokens one after another in `values`; `lengths` and `first` are per row."""
        starts = np.concatenate([[0], np.cumsum(lengths)])
        done = 0
        while done < len(ids):
            room = np.searchsorted(starts, starts[done] + _SHARD_TOKENS - self._held_tokens, side="right") - 1
            stop = min(len(ids), done + self.shard_rows - self._held_rows, int(room))
            part = slice(done, stop)
            tokens = values[starts[done] : starts[stop]].astype(self.dtype)
            self._chunks.append(
                (ids[part], tokens, lengths[part].astype(np.int32), first[part].astype(np.uint16))
            )
            self._held_rows += stop - done
            self._held_tokens += len(tokens)
            done = stop
            if self._held_rows == self.shard_rows or done < len(ids):
                self._flush()
        self._hashes.append(hash_ids([name.encode() for name in ids]))
        self.rows += len(ids)

    def close(self) -> None:
        """Write what is left, and the lookup."""
        if self._held_rows or not self._files:
            self._flush()
        hashes = np.concatenate([*self._hashes, np.zeros(0, np.uint64)])
        order = np.argsort(hashes, kind="stable").astype(np.int64)
        columns = {"hash": pa.array(hashes[order]), "row": pa.array(order)}
        _write_arrow(self.folder / f"lookup-{self.name}.arrow", pa.record_batch(columns))

    def _flush(self) -> None:
        empty = np.zeros(0, np.int32)
        lengths = np.concatenate([empty, *(chunk[2] for chunk in self._chunks)])
        values = np.concatenate([np.zeros(0, self.dtype), *(chunk[1] for chunk in self._chunks)])
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
        columns = {
            "id": pa.array([name for chunk in self._chunks for name in chunk[0]], pa.large_string()),
            "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
            "first_length": pa.array(
                np.concatenate([empty, *(chunk[3] for chunk in self._chunks)]).astype(np.uint16)
            ),
        }
        _write_arrow(self.folder / f"{self.name}-{self._files:05d}.arrow", pa.record_batch(columns))
        self._chunks, self._held_rows, self._held_tokens = [], 0, 0
        self._files += 1


def hash_ids(encoded: Sequence[bytes]) -> np.ndarray:
    """64-bit BLAKE2b hashes of UTF-8 ids, uint64."""
    digest = hashlib.blake2b
    return np.frombuffer(b"".join(digest(name, digest_size=8).digest() for name in encoded), "<u8").astype(
        np.uint64
    )


def _write_arrow(path: Path, batch: pa.RecordBatch) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _read_pieces(path: Path) -> Iterator[_Piece]:
    for batch in read_arrow(path, *_SCHEMAS):
        ids, tokens, first = batch.column("id"), batch.column("tokens"), batch.column("first_length")
        width = np.dtype(tokens.type.value_type.to_pandas_dtype())
        _, list_offsets, _, values = tokens.buffers()
        _, id_offsets, id_bytes = ids.buffers()
        rows = len(batch)
        if tokens.values.null_count or tokens.offset or ids.offset:
            raise InputError("holds nulls, or a slice of something larger", path=path)
        yield _Piece(
            values=_view(values, width),
            offsets=_view(list_offsets, np.int32, rows + 1),
            id_bytes=_view(id_bytes, np.uint8),
            id_offsets=_view(id_offsets, np.int64, rows + 1),
            first=_view(first.buffers()[1], np.uint16, rows),
        )


def _view(buffer: pa.Buffer | None, dtype: np.dtype | type, count: int = -1) -> np.ndarray:
    """A numpy array that looks into the buffer and keeps it alive (empty columns have no buffer)."""
    if buffer is None or buffer.size == 0:
        return np.zeros(max(count, 0), dtype)
    if count < 0:
        count = buffer.size // np.dtype(dtype).itemsize
    return np.frombuffer(buffer, dtype, count)
