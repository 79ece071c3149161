"""MS MARCO's folders: passages in three files' layouts, documents in one; queries and judgements per split.

| told by | documents | titles |
|---|---|---|
| `collection.tsv` | `pid, text` | `collection.tsv.title.tsv`: `pid, title` |
| `fullpsgs.tsv` | `pid, title, text` | in it |
| `msmarco-docs.tsv` | `docid, url, title, body`; the address is not used | in it |

Queries of a split are `SPLIT.query.txt`, `queries.SPLIT.tsv` or, of documents, `msmarco-docSPLIT-queries.tsv`;
judgements `qrels.SPLIT.tsv` or `msmarco-docSPLIT-qrels.tsv`. Any of the files may be gzip-compressed with `.gz` added
to its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lexmae.data.corpus import MARCO_FILES, Corpus, optional_file, required_file
from lexmae.data.lines import count_lines, read_tsv
from lexmae.data.qrels import Judgement, read_judgements
from lexmae.errors import InputError


def open_folder(folder: Path) -> MarcoFolder:
    """The folder as passages, or as documents where it holds `msmarco-docs.tsv`.

    Raises:
        InputError: it holds both.
    """
    held = [path for path in (optional_file(folder, name) for name in MARCO_FILES) if path]
    documents = [path for path in held if path.name.startswith("msmarco-docs")]
    if documents and len(held) > 1:
        raise InputError(f"holds both {held[0].name} (passages) and {documents[0].name} (documents): which is meant?",
                         path=folder)
    return MarcoDocuments(folder) if documents else MarcoFolder(folder)


class MarcoFolder(Corpus):
    """`collection.tsv` (with `collection.tsv.title.tsv`) or else `fullpsgs.tsv`; queries and judgements per
    split.
    """

    query_files = (("queries.*.tsv*", "queries.", ".tsv"), ("*.query.txt*", "", ".query.txt"))
    """Names of files of queries: a pattern, and what stands before and behind the split."""

    def size_hint(self) -> int | None:
        """Lines of the documents' file."""
        folder = Path(self.source)
        return count_lines(optional_file(folder, "collection.tsv") or required_file(folder, "fullpsgs.tsv"))

    def splits(self) -> list[str]:
        return sorted(self._query_files())

    def judgements(self, split: str) -> Iterator[Judgement] | None:
        self._known(split)
        path = optional_file(Path(self.source), f"qrels.{split}.tsv")
        return None if path is None else read_judgements(path)

    def _query_files(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for pattern, prefix, suffix in self.query_files:
            for file in sorted(Path(self.source).glob(pattern)):
                name = file.name.removesuffix(".gz")
                if name.endswith(suffix) and not name.startswith("."):
                    found[name[len(prefix) : -len(suffix)]] = file
        return found

    def _passage_rows(self):
        folder = Path(self.source)
        path = optional_file(folder, "collection.tsv")
        if path is None:
            path = required_file(folder, "fullpsgs.tsv")
            for line, (pid, title, text) in read_tsv(path, "pid", "title", "text"):
                yield path, line, pid, title, text
            return
        titles = _Titles(optional_file(folder, "collection.tsv.title.tsv"))
        for line, (pid, text) in read_tsv(path, "pid", "text"):
            yield path, line, pid, titles.take(pid), text
        titles.finish()

    def _query_rows(self, split: str):
        self._known(split)
        path = self._query_files()[split]
        for line, (qid, text) in read_tsv(path, "qid", "text"):
            yield path, line, qid, text


class MarcoDocuments(MarcoFolder):
    """`msmarco-docs.tsv`: long documents with an address, a title and a body."""

    query_files = (*MarcoFolder.query_files, ("msmarco-doc*-queries.tsv*", "msmarco-doc", "-queries.tsv"))

    def size_hint(self) -> int | None:
        """Lines of the documents' file."""
        return count_lines(required_file(Path(self.source), "msmarco-docs.tsv"))

    def judgements(self, split: str) -> Iterator[Judgement] | None:
        self._known(split)
        path = optional_file(Path(self.source), f"msmarco-doc{split}-qrels.tsv")
        return super().judgements(split) if path is None else read_judgements(path)

    def _passage_rows(self):
        path = required_file(Path(self.source), "msmarco-docs.tsv")
        for line, (docid, _url, title, body) in read_tsv(path, "docid", "url", "title", "body"):
            yield path, line, docid, title, body


class _Titles:
    """Titles read alongside the collection: in constant memory when both files have the same order."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._rows = iter(()) if path is None else read_tsv(path, "pid", "title")
        self._waiting: dict[str, tuple[str, int]] = {}

    def take(self, pid: str) -> str:
        """The title of a passage, "" when it has none."""
        while pid not in self._waiting:
            line, row = next(self._rows, (0, None))
            if row is None:
                return ""
            if row[0] in self._waiting:
                raise InputError(f"repeated document id {row[0]!r}", path=self.path, line=line)
            self._waiting[row[0]] = (row[1], line)
        return self._waiting.pop(pid)[0]

    def finish(self) -> None:
        """Every title must have found its passage: otherwise the two files do not belong together."""
        for line, row in self._rows:
            self._waiting[row[0]] = (row[1], line)
        for pid, (_, line) in self._waiting.items():
            raise InputError(f"title of unknown (or repeated) document {pid!r}", path=self.path, line=line)
