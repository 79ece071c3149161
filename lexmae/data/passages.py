"""Documents longer than a passage: cut into overlapping windows of tokens when shards are made, put together again
when they are judged.

The passages of document `D` are the rows `D#0`, `D#1`, … of the shards' table, one behind the other; a document that
is not too long is `D#0` alone. Judgements name documents. `ends.npy` of the shards holds where the rows of each
document end.

Shapes: D documents, P passages of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lexmae.checked import check_offsets, read_array
from lexmae.data.tokenizer import MISSING_TITLE, Encoded, TextEncoder
from lexmae.data.tokens import TokenTable
from lexmae.errors import InputError

ENDS = "ends.npy"
SEPARATOR = "#"
_NUMBER = re.compile(rf"{SEPARATOR}[0-9]+$")


def passage_id(document: str, number: int) -> str:
    """The id of a document's passage, counted from 0."""
    return f"{document}{SEPARATOR}{number}"


def document_of(identifier: str) -> str:
    """The document of a passage; the id itself where it is no passage's."""
    return _NUMBER.sub("", identifier)


def check_document_id(document: str, source: str | Path) -> None:
    """InputError for an id of a collection that could be taken for a passage's."""
    if _NUMBER.search(document):
        raise InputError(f"document id {document!r} ends like the number of a passage ({SEPARATOR}0, {SEPARATOR}1, …), "
                         "which splitting documents adds", path=source)


def windows(encoder: TextEncoder, titles: list[str], texts: list[str], max_length: int,
            stride: int) -> tuple[Encoded, np.ndarray]:
    """Rows `[CLS] title [SEP] window [SEP]` of at most `max_length` tokens, and how many each document has, int64 [D].

    A document that fits is one row. Of others, a title that would take more than half of the room is cut to that, and a
    window begins `stride` tokens behind the one before it, or right behind it where that is less, so that every token
    of the text is in some window. A blank title becomes `-`.

    Args:
        titles, texts: of D documents.
        stride: tokens of the text from one window's beginning to the next one's.
    """
    before, between, behind = encoder.pair_template
    room = max_length - len(before) - len(between) - len(behind)
    title_values, title_lengths = encoder.plain([title if title.strip() else MISSING_TITLE for title in titles])
    text_values, text_lengths = encoder.plain(texts)
    whole = title_lengths + text_lengths <= room
    kept = np.where(whole, title_lengths, np.minimum(title_lengths, max(room // 2, 1)))  # of each title
    step = np.maximum(1, np.minimum(stride, room - kept))
    counts = 1 + np.maximum(0, -(-(text_lengths - (room - kept)) // step))
    owner = np.repeat(np.arange(len(titles)), counts)  # [P]
    start = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * step[owner]
    kept, taken = kept[owner], np.minimum(text_lengths[owner] - start, (room - kept)[owner])
    pool = np.concatenate([before, between, behind, title_values, text_values]).astype(np.uint32)
    of_titles = len(before) + len(between) + len(behind)  # where the titles begin in the pool
    of_texts = of_titles + len(title_values)
    one = np.ones_like(owner)
    pieces = [(0 * one, len(before) * one),
              (of_titles + (np.cumsum(title_lengths) - title_lengths)[owner], kept),
              (len(before) * one, len(between) * one),
              (of_texts + (np.cumsum(text_lengths) - text_lengths)[owner] + start, taken),
              ((len(before) + len(between)) * one, len(behind) * one)]
    starts, sizes = (np.stack(values, axis=1) for values in zip(*pieces, strict=True))  # [P, 5]
    values = pool[_ranges(starts.ravel(), sizes.ravel())]
    return Encoded(values, sizes.sum(1), kept + encoder.first_specials, kept < title_lengths[owner]), counts


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """`start, start + 1, …` of each range, one behind the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)


def read(folder: str | Path) -> PassageMap:
    """The documents of a folder of shards."""
    table = TokenTable(folder, "docs", "document")
    return PassageMap(table, read_ends(folder, len(table)) if (Path(folder) / ENDS).is_file() else None)


def read_ends(folder: str | Path, rows: int) -> np.ndarray:
    """Where the rows of each document end, int64 [D]. InputError where they do not cover ``rows``."""
    path = Path(folder) / ENDS
    ends = read_array(path, np.int64)
    check_offsets(np.concatenate([np.zeros(1, np.int64), ends]), rows, path, "ends of documents")
    return ends


class PassageMap:
    """Which rows of the table of documents belong to which document.

    Args:
        table: the rows.
        ends: int64 [D], where the rows of each document end; None where every row is a document.
    """

    def __init__(self, table: TokenTable, ends: np.ndarray | None):
        self.table, self.ends = table, ends

    def __len__(self) -> int:
        return len(self.table) if self.ends is None else len(self.ends)

    def ids(self, documents: np.ndarray) -> list[str]:
        """The ids of documents, given by number."""
        if self.ends is None:
            return self.table.ids(documents)
        return [document_of(name) for name in self.table.ids(self._starts(documents))]

    def numbers(self, ids: Sequence[str]) -> np.ndarray:
        """The number of each document, int64; InputError names the first that is unknown."""
        if self.ends is None:
            return self.table.rows(ids)
        known = self.table.contains([passage_id(name, 0) for name in ids])
        if not known.all():
            raise InputError(f"unknown document {ids[int(np.argmin(known))]!r}", path=self.table.folder)
        return np.searchsorted(self.ends, self.table.rows([passage_id(name, 0) for name in ids]), side="right")

    def documents_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the document that each row belongs to, int64."""
        rows = np.asarray(rows, np.int64)
        return rows if self.ends is None else np.searchsorted(self.ends, rows, side="right")

    def contains(self, ids: Sequence[str]) -> np.ndarray:
        """Which of the ids are documents, bool."""
        return self.table.contains(ids if self.ends is None else [passage_id(name, 0) for name in ids])

    def rows(self, documents: np.ndarray, which: str = "all") -> np.ndarray:
        """The rows of documents, given by number, one document behind the other: `all`, or the `first` of each."""
        documents = np.asarray(documents, np.int64)
        if self.ends is None:
            return documents
        starts = self._starts(documents)
        return starts if which == "first" else _ranges(starts, self.ends[documents] - starts)

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        """How many rows documents have, int64."""
        documents = np.asarray(documents, np.int64)
        return np.ones_like(documents) if self.ends is None else self.ends[documents] - self._starts(documents)

    def rows_named(self, names: Sequence[str], which: str = "all") -> tuple[np.ndarray, np.ndarray]:
        """Rows of a list that names documents or, where documents are split, single passages; in its order, no row
        twice.

        Returns:
            The rows, and the place in ``names`` that each comes from, both int64 [R].

        Raises:
            InputError: names the first that is neither.
        """
        if self.ends is None:
            rows, places = self.table.rows(names), np.arange(len(names))
        else:
            rows, places = self._rows_of_either(names, which)
        first = np.sort(np.unique(rows, return_index=True)[1])
        return rows[first], places[first]

    def _rows_of_either(self, names: Sequence[str], which: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows and places, with repeats, where documents are split."""
        single = self.table.contains(names)
        starts, sizes = np.empty(len(names), np.int64), np.ones(len(names), np.int64)
        starts[single] = self.table.rows([name for name, alone in zip(names, single, strict=True) if alone])
        documents = self.numbers([name for name, alone in zip(names, single, strict=True) if not alone])
        starts[~single] = self._starts(documents)
        if which == "all":
            sizes[~single] = self.sizes(documents)
        return _ranges(starts, sizes), np.repeat(np.arange(len(names)), sizes)

    def _starts(self, documents: np.ndarray) -> np.ndarray:
        documents = np.asarray(documents, np.int64)
        return np.where(documents > 0, self.ends[documents - 1], 0)
