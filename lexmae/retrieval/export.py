"""Vectors in the formats of other search engines.

| format | documents | queries |
|---|---|---|
| ``anserini`` | ``docs-NNNNN.jsonl``: ``{"id", "contents", "vector": {token: int}}`` | ``topics.tsv``: ``qid⇥tok tok …``, each token repeated as often as it weighs |
| ``opensearch`` | ``mapping.json`` (field ``lexicon`` of type ``rank_features``); ``bulk-NNNNN.ndjson`` for ``_bulk``: ``{"index": {"_id"}}``, ``{"lexicon": {term id: int}}`` | ``queries.jsonl``: ``{"id", "query_tokens": {term id: int}}`` of ``neural_sparse`` |
| ``elasticsearch`` | the same with the type ``sparse_vector`` | ``queries.jsonl``: ``{"id", "query_vector": {term id: int}}`` of ``sparse_vector`` |
| ``seismic`` | ``docs-NNNNN.jsonl``: ``{"id", "content", "vector": {token: int}}`` | ``queries.jsonl``, the same |
| ``csr`` | ``vectors.npz`` for ``scipy.sparse.load_npz``; ``ids.txt``, a line each; ``vocabulary.json`` | the same |

Every export is read back and compared with the vectors (``export_check.py``), unless that is turned off.
Anserini reads weights as integers and splits terms at white space; what it would misread is an error here.
OpenSearch and Elasticsearch do not allow dots in the names of features, hence term ids instead of tokens; both know
``rank_features``. Both types keep 9 significant bits of a weight, which holds every whole number up to 512.
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from lexmae import artifact
from lexmae.cli import progress
from lexmae.errors import InputError
from lexmae.retrieval import export_check
from lexmae.retrieval.vectors import SparseVectors, write_vocabulary

KIND = "export"
FILE_SIZE = 100_000  # documents per file
_LONGEST = 255  # Lucene's white space tokenizer cuts longer terms


def export(vectors: SparseVectors | str | Path, layout: str, output: str | Path, *, side: str | None = None,
           file_size: int = FILE_SIZE, overwrite: bool = False,
           check: int = export_check.SAMPLE) -> artifact.Manifest:
    """Write vectors (or the artifact that holds them) as the directory ``output``.

    Args:
        layout: a key of ``FORMATS``.
        side: ``docs`` or ``queries``; by default what the vectors say of themselves.
        check: read everything back and compare the scores for so many sampled queries; 0 does not. What it finds is
            ``extra["check"]`` of the manifest.
    """
    if layout not in FORMATS:
        raise InputError(f"unknown format '{layout}': known are {', '.join(FORMATS)}")
    artifact.refuse_existing(Path(output), overwrite)
    inputs = {}
    if not isinstance(vectors, SparseVectors):
        inputs["vectors"] = vectors
        vectors = SparseVectors.open(vectors, side=side)
    side = side or vectors.extra.get("side")
    if side not in ("docs", "queries"):
        raise InputError("these vectors do not say whether they are of docs or of queries: give the side")
    with artifact.create(output, KIND, inputs=inputs, config={"format": layout, "side": side},
                         overwrite=overwrite) as draft:
        FORMATS[layout](vectors, draft.path, side, file_size)
        draft.counts["rows"] = len(vectors)
        draft.extra["vectors"] = vectors.extra
        if check:
            draft.extra["check"] = export_check.check(vectors, draft.path, layout, side, check)
    return artifact.read(output, KIND)


def export_anserini(vectors: SparseVectors, folder: Path, side: str, file_size: int = FILE_SIZE) -> None:
    """Write documents as JSON lines, or queries as ``topics.tsv``, into an existing folder.

    Raises:
        InputError: a token or an id that Anserini would split or merge with another, a text without any term.
    """
    check_anserini(vectors)
    if side == "docs":
        _write_files(folder, "docs", "jsonl", _anserini_documents(vectors), len(vectors), file_size)
        return
    names = np.array(vectors.vocabulary, dtype=object)
    with artifact.atomic_file(folder / "topics.tsv") as out:
        for name, terms, weights in progress(vectors.rows(), total=len(vectors), desc="export", unit="query"):
            out.write(f"{name}\t{' '.join(np.repeat(names[terms], weights).tolist())}\n")


def check_anserini(vectors: SparseVectors) -> None:
    """InputError when Anserini would not read the vectors as they are."""
    used: dict[str, int] = {}
    for term in np.unique(vectors.indices).tolist():
        token = vectors.vocabulary[term]
        if token.split() != [token] or any(c.isspace() for c in token):
            raise InputError(f"the token {token!r} (id {term}) is empty or contains white space, where Anserini would "
                             "split it")
        if len(token.encode("utf-16-le")) // 2 > _LONGEST:
            raise InputError(f"the token {token[:30]!r}… (id {term}) has more than {_LONGEST} characters, where "
                             "Anserini would cut it")
        if token in used:
            raise InputError(f"the token {token!r} has the ids {used[token]} and {term}, which Anserini would merge")
        used[token] = term
    for name in vectors.ids:
        if name.split() != [name]:
            raise InputError(f"the id {name!r} is empty or contains white space and cannot stand in a run")
    empty = np.flatnonzero(np.diff(vectors.indptr) == 0)
    if len(empty):
        raise InputError(f"'{vectors.ids[empty[0]]}' has no term: Anserini would drop it")
    if not np.issubdtype(vectors.weights.dtype, np.integer):
        raise InputError("weights must be integers: Anserini would read 0.9 as 0")


def _anserini_documents(vectors: SparseVectors) -> Iterator[str]:
    names = np.array(vectors.vocabulary, dtype=object)
    for name, terms, weights in vectors.rows():
        vector = dict(zip(names[terms].tolist(), weights.tolist(), strict=True))
        yield _line({"id": name, "contents": "", "vector": vector})


def _export_seismic(vectors: SparseVectors, folder: Path, side: str, file_size: int) -> None:
    names = np.array(vectors.vocabulary, dtype=object)
    lines = (_line({"id": name, "content": "", "vector": dict(zip(names[terms].tolist(), weights.tolist(),
                                                                  strict=True))})
             for name, terms, weights in vectors.rows())
    if side == "docs":
        _write_files(folder, "docs", "jsonl", lines, len(vectors), file_size)
    else:
        _write_one(folder / "queries.jsonl", lines, len(vectors))


def _export_opensearch(vectors: SparseVectors, folder: Path, side: str, file_size: int) -> None:
    _export_bulk(vectors, folder, side, file_size, "rank_features", "query_tokens")


def _export_elasticsearch(vectors: SparseVectors, folder: Path, side: str, file_size: int) -> None:
    _export_bulk(vectors, folder, side, file_size, "sparse_vector", "query_vector")


def _export_bulk(vectors: SparseVectors, folder: Path, side: str, file_size: int, kind: str, key: str) -> None:
    def features(terms: np.ndarray, weights: np.ndarray) -> dict[str, int]:
        return dict(zip(map(str, terms.tolist()), weights.tolist(), strict=True))

    if side == "docs":
        with artifact.atomic_file(folder / "mapping.json") as out:
            json.dump({"mappings": {"properties": {"lexicon": {"type": kind}}}}, out, indent=1)
            out.write("\n")
        lines = (_line({"index": {"_id": name}}) + _line({"lexicon": features(terms, weights)})
                 for name, terms, weights in vectors.rows())
        _write_files(folder, "bulk", "ndjson", lines, len(vectors), file_size)
    else:
        lines = (_line({"id": name, key: features(terms, weights)})
                 for name, terms, weights in vectors.rows())
        _write_one(folder / "queries.jsonl", lines, len(vectors))


def _export_csr(vectors: SparseVectors, folder: Path, side: str, file_size: int) -> None:
    import scipy.sparse

    for name in vectors.ids:
        if name.split("\n") != [name]:
            raise InputError(f"the id {name!r} contains a line end and cannot stand in a line of its own")
    matrix = scipy.sparse.csr_array((vectors.weights, vectors.indices, vectors.indptr),
                                    shape=(len(vectors), vectors.n_terms))
    scipy.sparse.save_npz(folder / "vectors.npz", matrix)
    with artifact.atomic_file(folder / "ids.txt") as out:
        out.writelines(f"{name}\n" for name in vectors.ids)
    write_vocabulary(folder, vectors.vocabulary)


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _write_files(folder: Path, name: str, suffix: str, lines: Iterable[str], total: int, file_size: int) -> None:
    lines = iter(progress(lines, total=total, desc="export", unit="doc"))
    for number in range(max(1, -(-total // file_size))):
        with artifact.atomic_file(folder / f"{name}-{number:05d}.{suffix}") as out:
            out.writelines(islice(lines, file_size))


def _write_one(path: Path, lines: Iterable[str], total: int) -> None:
    with artifact.atomic_file(path) as out:
        out.writelines(progress(lines, total=total, desc="export", unit="query"))


# name → (vectors, folder, side, documents per file)
FORMATS: dict[str, Callable[[SparseVectors, Path, str, int], None]] = {
    "anserini": export_anserini, "opensearch": _export_opensearch, "elasticsearch": _export_elasticsearch,
    "seismic": _export_seismic, "csr": _export_csr}
