"""Relevance judgements (qrels): TREC and BEIR layout in, BEIR layout out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lexmae import artifact
from lexmae.data.lines import blank_cells, read_lines
from lexmae.errors import InputError

Qrels = dict[str, dict[str, int]]
QRELS_HEADER = "query-id\tcorpus-id\tscore"

_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Judgement:
    """One relevance judgement and where it was read (`line` counts from 1)."""

    qid: str
    docid: str
    relevance: int
    path: str | Path
    line: int


def read_judgements(path: str | Path) -> Iterator[Judgement]:
    """Judgements of a file, one by one: TREC `qid 0 pid rel`, or three columns with or without the BEIR
    header.

    Columns are separated by tabs or spaces. Raises InputError for a bad line or a file without judgements.
    """
    count = 0
    first = True
    for line, text in read_lines(path):
        cells = blank_cells(text)
        header = first and len(cells) == 3 and cells[0].lower() in ("query-id", "query_id", "qid")
        first = False
        if header:
            continue
        if len(cells) not in (3, 4):
            reason = f"expected `qid 0 pid rel` or `query-id corpus-id score`, found {len(cells)} columns"
            raise InputError(reason, path=path, line=line)
        if not _WHOLE_NUMBER.fullmatch(cells[-1]):
            reason = f"relevance {cells[-1]!r} is not a whole number of up to nine digits"
            raise InputError(reason, path=path, line=line)
        count += 1
        yield Judgement(cells[0], cells[-2], int(cells[-1]), path, line)
    if not count:
        raise InputError("no judgements in this file", path=path)


def gather(rows: Iterable[Judgement]) -> Qrels:
    """Judgements as {query: {document: relevance}}; the same pair judged twice differently is an error."""
    qrels: Qrels = {}
    for row in rows:
        known = qrels.setdefault(row.qid, {}).setdefault(row.docid, row.relevance)
        if known != row.relevance:
            reason = f"query {row.qid!r}, document {row.docid!r}: judged {known} before, {row.relevance} here"
            raise InputError(reason, path=row.path, line=row.line)
    return qrels


def first_judgements(rows: Iterable[Judgement] | None) -> dict[str, Judgement] | None:
    """The first judgement of each query."""
    if rows is None:
        return None
    first: dict[str, Judgement] = {}
    for row in rows:
        first.setdefault(row.qid, row)
    return first


def read_qrels(path: str | Path) -> Qrels:
    """Judgements {query: {document: relevance}} of a file in TREC or BEIR layout."""
    return gather(read_judgements(path))


def write_qrels(path: str | Path, qrels: Mapping[str, Mapping[str, int]]) -> None:
    """Write judgements in BEIR layout; the file appears under its name when it is complete."""
    with artifact.atomic_file(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(QRELS_HEADER + "\n")
        for qid, judged in qrels.items():
            file.writelines(f"{qid}\t{docid}\t{int(relevance)}\n" for docid, relevance in judged.items())
