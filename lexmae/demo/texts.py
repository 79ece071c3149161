"""Texts by id for collections of any size: a temporary database on disk, so that memory does not grow with them."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from lexmae.cli import progress
from lexmae.data.corpus import Corpus, Passage
from lexmae.data.passages import document_of
from lexmae.errors import InputError


class TextStore:
    """The documents of a collection, and which row of the vectors each has.

    The database lies in the system's folder for temporary files (`TMPDIR` moves it) and goes with `close()`.

    Args:
        corpus: where the texts are.
        ids: of the vectors, row by row; documents, or passages of split documents.

    Raises:
        InputError: a vector has no text: the two do not belong together.
    """

    def __init__(self, corpus: Corpus, ids: Sequence[str]):
        self._folder = tempfile.TemporaryDirectory(prefix="lexmae-demo-")
        self._lock = threading.Lock()
        try:
            file = Path(self._folder.name) / "texts.sqlite"
            self._base = sqlite3.connect(file, check_same_thread=False)
            self._base.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; "
                                     "CREATE TABLE texts (id TEXT, title TEXT, text TEXT); "
                                     "CREATE TABLE rows (id TEXT, number INTEGER);")
            self._fill(corpus, ids)
        except BaseException:
            self.close()
            raise

    def _fill(self, corpus: Corpus, ids: Sequence[str]) -> None:
        total = corpus.size_hint()
        with self._base:
            passages = progress(corpus.passages(), total=total, desc="texts", unit=" documents")
            self._insert("texts", ((one.id, one.title, one.text) for one in passages), 3)
            self._insert("rows", ((name, row) for row, name in enumerate(ids)), 2)
            self._base.execute("CREATE UNIQUE INDEX by_text ON texts (id)")
            self._base.execute("CREATE UNIQUE INDEX by_row ON rows (id)")
        for name in (ids[0], ids[len(ids) // 2], ids[-1]) if len(ids) else ():
            if self.text(name) is None:
                raise InputError(f"has no document {name!r}, of which there is a vector: do they belong together?",
                                 corpus.source)

    def _insert(self, table: str, rows: Iterable[tuple], columns: int) -> None:
        self._base.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * columns)})", rows)

    def text(self, identifier: str) -> Passage | None:
        """A document, or the document that a passage is of; None where there is none."""
        for name in dict.fromkeys((identifier, document_of(identifier))):
            found = self._one("SELECT id, title, text FROM texts WHERE id = ?", name)
            if found:
                return Passage(*found)
        return None

    def row(self, identifier: str) -> int | None:
        """The row of a vector."""
        found = self._one("SELECT number FROM rows WHERE id = ?", identifier)
        return found[0] if found else None

    def _one(self, query: str, value: str) -> tuple | None:
        with self._lock:
            return self._base.execute(query, (value,)).fetchone()

    def close(self) -> None:
        """Remove the database."""
        if hasattr(self, "_base"):
            self._base.close()
        self._folder.cleanup()
