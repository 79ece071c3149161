"""Hard negatives: every format in which they are published, read into one, and the project's own format
written.

| format | told by | a row |
|---|---|---|
| own | JSON lines, `negatives` | `{"qid", "negatives": [id…], "scores": […]?, "positives": {…}?, "passages": [id…]?}` |
| sentence-transformers | JSON lines with `neg` | `{"qid", "pos": [id…], "neg": {system: [id…]}}` |
| MS MARCO `train.negatives.tsv` | two tab-separated columns | `qid, "pid,pid,…"` |
| MS MARCO `top1000.*` | four tab-separated columns | `qid, pid, query, passage` |
| TREC run | six columns, the second `Q0` | `qid Q0 docid rank score tag` |
| research code's pickle | name ends with `.pkl` | `{qid: [pid…]}` |

Scores are a teacher's: retrieval scores (of a run, of a pickle) are not passed on, since a student must not
learn them by accident. `positives` are the teacher's scores of the judged positives, which distillation and
filters compare with. `passages` are the best ranked passage of each judged positive, where documents are split.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from lexmae import sidecar
from lexmae.data.lines import (
    blank_cells,
    check_id,
    check_score,
    first_lines,
    read_lines,
    read_objects,
    read_tsv,
)
from lexmae.data.pickles import load_plain
from lexmae.errors import InputError


class Row(NamedTuple):
    """The negatives of a query, best first, with a teacher's scores of them and of its positives, and the positives'
    best passages, where known."""

    qid: str
    negatives: list[str]
    scores: list[float] | None = None
    positives: dict[str, float] | None = None
    passages: list[str] | None = None


def read_negatives(path: str | Path) -> Iterator[Row]:
    """One `Row` per query.

    Raises InputError for a format that is not known, an empty file, a bad line, a repeated query, and a file that has
    not the checksum that stands beside it.
    """
    sidecar.verify(path)
    seen: set[str] = set()
    for line, row in _rows(Path(path)):
        if row.qid in seen:
            raise InputError(f"repeated query {row.qid!r}", path=path, line=line)
        seen.add(row.qid)
        yield row
    if not seen:
        raise InputError("no negatives in this file", path=path)


def write_negatives(path: str | Path, rows: Iterable[Row | tuple]) -> None:
    """Write the project's own JSON lines, and their checksum beside them; complete, or not there.

    Args:
        rows: `Row`s, or tuples of their first fields.
    """
    with sidecar.checksummed_file(path) as file:
        for values in rows:
            file.write(to_line(Row(*values)))


def to_line(row: Row) -> bytes:
    """A row as a line of the project's own format."""
    qid, negatives, scores, positives, passages = row
    found: dict = {"qid": qid, "negatives": list(negatives)}
    if scores is not None:
        if len(scores) != len(found["negatives"]):
            raise ValueError(f"query {qid!r}: {len(found['negatives'])} negatives but {len(scores)} scores")
        found["scores"] = [float(score) for score in scores]
    if positives is not None:
        found["positives"] = {name: float(score) for name, score in positives.items()}
    if passages is not None:
        found["passages"] = list(passages)
    return json.dumps(found, ensure_ascii=False).encode() + b"\n"


def _rows(path: Path) -> Iterator[tuple[int | None, Row]]:
    """Tell the format and hand the file to its reader."""
    if path.name.endswith((".pkl", ".pkl.gz", ".pickle")):
        return _read_pickle(path)
    head = first_lines(path, 1)
    if not head:
        raise InputError("the file is empty", path=path)
    number, line = head[0]
    if line.lstrip(" \t").startswith("{"):
        return _read_json(path)
    cells = blank_cells(line)
    if len(cells) == 6 and cells[1].upper() == "Q0":
        return _read_run(path)
    columns = line.count("\t") + 1
    if columns == 2:
        return _read_lists(path)
    if columns == 4:
        return _read_candidates(path)
    reason = (
        "unknown format of negatives: expected JSON lines, `qid<tab>pid,pid,…`,"
        " `qid<tab>pid<tab>query<tab>passage`, a TREC run or a .pkl file"
    )
    raise InputError(reason, path=path, line=number)


def _read_json(path: Path) -> Iterator[tuple[int, Row]]:
    for line, row in read_objects(path):
        qid = check_id(row.get("qid"), "qid", path, line)
        if "negatives" in row:
            yield line, Row(qid, *_own_row(row, path, line))
        elif isinstance(row.get("neg"), dict):
            yield line, Row(qid, *_system_row(row, path, line))
        else:
            raise InputError('expected a list "negatives" or an object "neg"', path=path, line=line)


def _own_row(row: dict, path: Path, line: int) -> tuple:
    """The fields of a `Row` behind the query."""
    ids, scores, positives = _id_list(row["negatives"], path, line), row.get("scores"), row.get("positives")
    passages = None if row.get("passages") is None else _id_list(row["passages"], path, line)
    if positives is not None:
        if not isinstance(positives, dict):
            raise InputError("positives: an object of document ids and scores is needed", path=path, line=line)
        positives = {check_id(name, "document id", path, line): check_score(score, "score", path, line)
                     for name, score in positives.items()}
    if scores is None:
        return ids, None, positives, passages
    if not isinstance(scores, list) or len(scores) != len(ids):
        found = f"{len(scores)} scores" if isinstance(scores, list) else "no list"
        raise InputError(
            f"scores: expected one for each of {len(ids)} negatives, found {found}", path=path, line=line
        )
    return ids, [check_score(score, "score", path, line) for score in scores], positives, passages


def _system_row(row: dict, path: Path, line: int) -> tuple[list[str], list[float] | None]:
    """Several systems' lists become one: first ranks first, without repeats and positives.

    An entry is an id, or `{"pid", "ce-score"}` in the releases that carry a cross-encoder's scores.
    """
    positives = {pid for pid, _ in _entries(row.get("pos") or [], path, line)}
    lists = [_entries(entries, path, line) for entries in row["neg"].values()]
    merged: dict[str, float | None] = {}
    for rank in zip_longest(*lists):
        for pid, score in (entry for entry in rank if entry is not None):
            if pid not in positives:
                merged.setdefault(pid, score)
    scores = [score for score in merged.values() if score is not None]
    return list(merged), scores if merged and len(scores) == len(merged) else None


def _entries(entries: object, path: Path, line: int) -> list[tuple[str, float | None]]:
    if not isinstance(entries, list):
        raise InputError("expected a list of documents", path=path, line=line)
    found: list[tuple[str, float | None]] = []
    for entry in entries:
        score = None
        if isinstance(entry, dict):
            if entry.get("ce-score") is not None:
                score = check_score(entry["ce-score"], "ce-score", path, line)
            entry = entry.get("pid")
        found.append((check_id(entry, "document id", path, line), score))
    return found


def _read_lists(path: Path) -> Iterator[tuple[int, Row]]:
    for line, (qid, pids) in read_tsv(path, "qid", "pid,pid,…"):
        yield line, Row(check_id(qid, "qid", path, line), _id_list(pids.split(","), path, line))


def _read_candidates(path: Path) -> Iterator[tuple[None, Row]]:
    """`top1000.*`: candidates in no particular order, a query's lines not always together; gathered in
    memory.
    """
    gathered: dict[str, dict[str, None]] = {}
    for line, (qid, pid, _query, _passage) in read_tsv(path, "qid", "pid", "query", "passage"):
        qid = check_id(qid, "qid", path, line)
        gathered.setdefault(qid, {})[check_id(pid, "pid", path, line)] = None
    for qid, pids in gathered.items():
        yield None, Row(qid, list(pids))


def _read_run(path: Path) -> Iterator[tuple[None, Row]]:
    """A TREC run: best score first, equal scores by document id, whatever the order of the lines."""
    gathered: dict[str, dict[str, float]] = {}
    for line, text in read_lines(path):
        cells = blank_cells(text)
        if len(cells) != 6:
            raise InputError(
                f"expected `qid Q0 docid rank score tag`, found {len(cells)} columns", path=path, line=line
            )
        qid, _, docid, _, score, _ = cells
        ranking = gathered.setdefault(qid, {})
        if docid in ranking:
            raise InputError(f"repeated document {docid!r} for query {qid!r}", path=path, line=line)
        ranking[docid] = check_score(score, "score", path, line)
    for qid, ranking in gathered.items():
        yield None, Row(qid, sorted(ranking, key=lambda docid: (-ranking[docid], docid)))


def _read_pickle(path: Path) -> Iterator[tuple[None, Row]]:
    table = load_plain(path)
    if not isinstance(table, dict):
        raise InputError(f"expected a dict of negatives, found {type(table).__name__}", path=path)
    for qid, entries in table.items():
        if isinstance(entries, dict):
            entries = list(entries)
        if not isinstance(entries, (list, tuple)):
            raise InputError(
                f"query {qid!r}: expected a list of ids, found {type(entries).__name__}", path=path
            )
        pids = [entry[0] if isinstance(entry, (list, tuple)) and entry else entry for entry in entries]
        yield None, Row(check_id(qid, "query id", path, None), _id_list(pids, path, None))


def _id_list(values: object, path: Path, line: int | None) -> list[str]:
    if not isinstance(values, list):
        raise InputError("expected a list of document ids", path=path, line=line)
    return [check_id(value, "document id", path, line) for value in values]
