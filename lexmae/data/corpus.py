"""Collections of passages, queries and judgements: MS MARCO folders, BEIR folders, Hugging Face datasets.

One interface over the three, and the writer of BEIR folders. Ids are strings; everything is streamed; each
bad line is an InputError that names file, line and reason. Needs no torch, and `datasets` only for a dataset
name.

- A BEIR folder is told by `corpus.jsonl`; `queries.jsonl` and `qrels/SPLIT.tsv` lie beside it.
- An MS MARCO folder is told by `collection.tsv`, `fullpsgs.tsv` or `msmarco-docs.tsv` (see `lexmae.data.marco`).
- A dataset name `owner/name`, where there is no such folder, has configurations `corpus` and `queries`; the
  judgements are the dataset `owner/name-qrels`.

Any of the files may be gzip-compressed with `.gz` added to its name.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lexmae import artifact
from lexmae.data.lines import check_id, check_text, count_lines, read_objects
from lexmae.data.negatives import read_negatives, write_negatives
from lexmae.data.qrels import (
    Judgement,
    Qrels,
    first_judgements,
    gather,
    read_judgements,
    read_qrels,
    write_qrels,
)
from lexmae.errors import InputError

__all__ = [
    "Corpus", "Judgement", "Passage", "Qrels", "Query", "read_judgements", "read_negatives", "read_qrels",
    "write_beir", "write_negatives", "write_qrels",
]  # fmt: skip

MARCO_FILES = ("collection.tsv", "fullpsgs.tsv", "msmarco-docs.tsv")

ALL = "all"  # the split of queries that come without any judgements

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Passage:
    """A document; title and text may be empty."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Query:
    """A query."""

    id: str
    text: str


class Corpus(ABC):
    """Base of the layouts: subclasses say where the records are, this class checks them.

    After a pass over `passages()`, `title_only` counts the documents with a title and no text, and `empty`
    those with neither. Published collections have both kinds (Cranfield has two empty abstracts, one of them
    judged), and none may disappear from the ranking: they are kept and counted.
    """

    title_only: int = 0
    empty: int = 0

    def __init__(self, source: str | Path) -> None:
        self.source = source

    @staticmethod
    def open(source: str | Path) -> Corpus:
        """The collection of a folder (BEIR or MS MARCO layout), or of a dataset name `owner/name`."""
        folder = Path(source)
        if folder.is_dir():
            beir = optional_file(folder, "corpus.jsonl")
            marco = next(filter(None, (optional_file(folder, name) for name in MARCO_FILES)), None)
            if beir and marco:
                raise InputError(
                    f"holds both {beir.name} (BEIR) and {marco.name} (MS MARCO): which is meant?", path=folder
                )
            if beir:
                return BeirFolder(folder)
            if marco:
                from lexmae.data.marco import open_folder

                return open_folder(folder)
            reason = (
                "neither a BEIR folder (corpus.jsonl) nor an MS MARCO folder (collection.tsv, fullpsgs.tsv or"
                " msmarco-docs.tsv)"
            )
            raise InputError(reason, path=folder)
        if folder.exists():
            raise InputError("is a file; expected a folder in BEIR or MS MARCO layout", path=folder)
        if isinstance(source, str) and _HUB_NAME.fullmatch(source):
            from lexmae.data.hub import HubDataset

            return HubDataset(source)
        raise InputError("no such folder, and no dataset name of the form owner/name", path=source)

    def passages(self) -> Iterator[Passage]:
        """Every document once, in the order of the source. Repeated ids are errors."""
        self.title_only = self.empty = 0
        seen: set[str] = set()
        for path, line, raw_id, raw_title, raw_text in self._passage_rows():
            docid = _new_id(raw_id, "document id", seen, path, line)
            title = check_text(raw_title, "title", path, line)
            text = check_text(raw_text, "text", path, line)
            if not text.strip():
                self.title_only += bool(title.strip())
                self.empty += not title.strip()
            yield Passage(docid, title, text)
        if not seen:
            raise InputError("no documents in this collection", path=self.source)

    def queries(self, split: str) -> Iterator[Query]:
        """The queries of a split, in the order of the source. Repeated ids and empty queries are errors.

        Where one file holds the queries of all splits (BEIR), those that the split judges; a judged query
        that the file lacks is an error.
        """
        wanted = self._judged(split)
        seen: set[str] = set()
        found = 0
        for path, line, raw_id, raw_text in self._query_rows(split):
            qid = _new_id(raw_id, "query id", seen, path, line)
            text = check_text(raw_text, "text", path, line)
            if not text.strip():
                raise InputError(f"query {qid!r} is empty", path=path, line=line)
            if wanted is None or qid in wanted:
                found += 1
                yield Query(qid, text)
        if wanted is not None and found < len(wanted):
            missing = next(judgement for qid, judgement in wanted.items() if qid not in seen)
            raise InputError(f"unknown query {missing.qid!r}", path=missing.path, line=missing.line)
        if not found:
            raise InputError(f"no queries in split {split!r}", path=self.source)

    def qrels(self, split: str) -> Qrels | None:
        """Judgements {query: {document: relevance}} of a split, or None when it has none."""
        rows = self.judgements(split)
        return None if rows is None else gather(rows)

    def size_hint(self) -> int | None:
        """About how many documents there are, where that is quick to tell (for a progress bar)."""
        return None

    @abstractmethod
    def splits(self) -> list[str]:
        """Names of the splits that have queries, sorted."""

    @abstractmethod
    def judgements(self, split: str) -> Iterator[Judgement] | None:
        """The judgements of a split one by one, each with its place in the source; None when it has none."""

    @abstractmethod
    def _passage_rows(self) -> Iterator[tuple[str | Path, int, object, object, object]]:
        """(path, line, id, title, text) of every document as the source has them."""

    @abstractmethod
    def _query_rows(self, split: str) -> Iterator[tuple[str | Path, int, object, object]]:
        """(path, line, id, text) of every query of a split as the source has them."""

    def _judged(self, split: str) -> dict[str, Judgement] | None:
        """The first judgement of each query, where queries are chosen by it."""
        return None

    def _known(self, split: str) -> None:
        if split not in self.splits():
            names = ", ".join(self.splits()) or "none"
            raise InputError(f"no split {split!r}; there are: {names}", path=self.source)


class BeirFolder(Corpus):
    """`corpus.jsonl`, `queries.jsonl`, `qrels/SPLIT.tsv`. Queries without any judgements form the split
    "all".
    """

    def size_hint(self) -> int | None:
        """Lines of the documents' file."""
        return count_lines(required_file(Path(self.source), "corpus.jsonl"))

    def splits(self) -> list[str]:
        if optional_file(Path(self.source), "queries.jsonl") is None:
            return []
        return sorted(self._qrels_files()) or [ALL]

    def judgements(self, split: str) -> Iterator[Judgement] | None:
        self._known(split)
        path = self._qrels_files().get(split)
        return None if path is None else read_judgements(path)

    def _qrels_files(self) -> dict[str, Path]:
        files = (Path(self.source) / "qrels").glob("[!.]*.tsv*")
        return {f.name.split(".tsv")[0]: f for f in files if f.name.endswith((".tsv", ".tsv.gz"))}

    def _passage_rows(self):
        path = required_file(Path(self.source), "corpus.jsonl")
        for line, row in read_objects(path):
            if "text" not in row:
                raise InputError('no "text" in this object', path=path, line=line)
            yield path, line, row.get("_id"), row.get("title"), row["text"]

    def _query_rows(self, split: str):
        path = required_file(Path(self.source), "queries.jsonl")
        for line, row in read_objects(path):
            yield path, line, row.get("_id"), row.get("text")

    def _judged(self, split: str) -> dict[str, Judgement] | None:
        return first_judgements(self.judgements(split))


def write_beir(
    folder: str | Path,
    passages: Iterable[Passage],
    queries: Iterable[Query],
    qrels: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> None:
    """Write a BEIR folder, qrels per split; it appears under its name when it is complete.

    Without queries there is no file of queries: documents alone are a collection too.
    """
    with artifact.create(folder, "corpus") as draft:
        documents = ({"_id": p.id, "title": p.title, "text": p.text} for p in passages)
        draft.counts["documents"] = _write_objects(draft.path / "corpus.jsonl", documents)
        rows = ({"_id": q.id, "text": q.text} for q in queries)
        draft.counts["queries"] = _write_objects(draft.path / "queries.jsonl", rows)
        if not draft.counts["queries"]:
            (draft.path / "queries.jsonl").unlink()
        (draft.path / "qrels").mkdir()
        for split, judged in qrels.items():
            write_qrels(draft.path / "qrels" / f"{split}.tsv", judged)
            draft.counts[f"qrels.{split}"] = sum(map(len, judged.values()))


def _write_objects(path: Path, rows: Iterable[dict]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _new_id(value: object, what: str, seen: set[str], path: str | Path, line: int) -> str:
    found = check_id(value, what, path, line)
    if found in seen:
        raise InputError(f"repeated {what} {found!r}", path=path, line=line)
    seen.add(found)
    return found


def optional_file(folder: Path, name: str) -> Path | None:
    """A file of a folder, plain or with `.gz` added to its name; None where there is neither."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def required_file(folder: Path, name: str) -> Path:
    """The same; InputError where there is neither."""
    path = optional_file(folder, name)
    if path is None:
        raise InputError(f"no {name} in this folder", path=folder)
    return path
