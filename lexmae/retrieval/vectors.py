"""Sparse vectors of documents or queries: ids and CSR arrays in memory, Arrow IPC files on disk.

Shapes: B rows of a batch, V vocabulary, R rows in all, P postings (non-zero weights) in all.

An artifact of kind ``vectors`` holds ``vocabulary.json`` (the token strings in the order of their ids) and one or
several ``part-RRRRR-NNNNN.arrow`` (rank, running number). A part has the columns ``id`` (string), ``terms`` (list of
int32, ascending) and ``weights`` (list of uint16, parallel to ``terms``). Parts are read in the order of their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from lexmae import artifact
from lexmae.checked import check_offsets, read_arrow, read_strings
from lexmae.errors import InputError
from lexmae.retrieval import checks

if TYPE_CHECKING:
    import scipy.sparse

KIND = "vectors"
VOCABULARY = "vocabulary.json"
SCALE = 100
MAX_WEIGHT = int(np.iinfo(np.uint16).max)
_SCHEMA = pa.schema([("id", pa.large_string()), ("terms", pa.large_list(pa.int32())),
                     ("weights", pa.large_list(pa.uint16()))])


class Csr(NamedTuple):
    """Rows of term ids and weights: row ``i`` is ``indices[indptr[i]:indptr[i + 1]]``, terms ascending."""

    indptr: np.ndarray  # int64 [R+1]
    indices: np.ndarray  # int32 [P]
    weights: np.ndarray  # uint16 [P]


def quantise(values: np.ndarray, unk_id: int, scale: float = SCALE, top_k: int | None = None) -> Csr:
    """Turn lexicon vectors into integer weights ``round(scale · v)`` and drop the zeros (SPEC: scale 100).

    The product is taken and rounded in float32, halves to the even neighbour, so that the same vectors give the same
    weights on every device. Weights above 65535 are cut to it.

    Args:
        values: float [B, V], not negative.
        unk_id: the term that a row without any weight gets, with weight 1, so that it does not disappear.
        top_k: keep only the ``top_k`` largest weights of each row; of equal weights the lower term ids stay.

    Raises:
        ValueError: a value is negative, infinite or not a number.
    """
    values = np.asarray(values, dtype=np.float32)
    _check_values(values)
    rounded = np.rint(values * np.float32(scale))
    rows, columns = np.nonzero(rounded)
    return pack(np.bincount(rows, minlength=len(values)), columns, rounded[rows, columns], unk_id, top_k)


def pack(counts: np.ndarray, terms: np.ndarray, weights: np.ndarray, unk_id: int, top_k: int | None = None) -> Csr:
    """Rows of weights that are whole numbers above 0 already, as ``quantise`` gives them.

    Args:
        counts: weights of each row, int [B].
        terms: int [P], ascending in each row.
        weights: float32 [P]; cut to 65535.
        unk_id, top_k: see ``quantise``.
    """
    return _finish(counts.astype(np.int64), np.array(terms, np.int32), _clip(weights), unk_id, top_k)


def least_weight(threshold: float | None) -> float:
    """The smallest integer weight that a threshold in the units of lexicon vectors leaves, at least 1."""
    return 1.0 if threshold is None else max(1.0, float(np.float32(threshold * SCALE)))


def quantise_csr(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, unk_id: int, scale: float = SCALE,
                 top_k: int | None = None) -> Csr:
    """``quantise`` for rows that are already sparse (``values`` float [P]); terms may come in any order."""
    values = np.asarray(values, dtype=np.float32)
    _check_values(values)
    rounded = np.rint(values * np.float32(scale))
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    order = np.lexsort((indices, rows))
    order = order[rounded[order] > 0]
    counts = np.bincount(rows[order], minlength=len(indptr) - 1)
    return pack(counts, np.asarray(indices)[order], rounded[order], unk_id, top_k)


def prune(csr: Csr, top_k: int) -> Csr:
    """Keep the ``top_k`` largest weights of each row; of equal weights the lower term ids stay."""
    if top_k < 1:
        raise InputError(f"top-k must be at least 1, not {top_k}")
    counts = np.diff(csr.indptr)
    if not len(counts) or counts.max(initial=0) <= top_k:
        return csr
    rows = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((csr.indices, -csr.weights.astype(np.int32), rows))
    keep = np.zeros(len(csr.indices), dtype=bool)
    keep[order[np.arange(len(order)) - csr.indptr[rows] < top_k]] = True
    return Csr(_offsets(np.minimum(counts, top_k)), csr.indices[keep], csr.weights[keep])


def _check_values(values: np.ndarray) -> None:
    if values.size and not (np.isfinite(values).all() and values.min() >= 0):
        raise ValueError("lexicon values must be finite and not negative")


def _clip(rounded: np.ndarray) -> np.ndarray:
    return np.minimum(rounded, MAX_WEIGHT).astype(np.uint16)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _finish(counts: np.ndarray, indices: np.ndarray, weights: np.ndarray, unk_id: int, top_k: int | None) -> Csr:
    """Give empty rows the unknown token, then prune."""
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        at = _offsets(counts)[empty]
        indices, weights = np.insert(indices, at, unk_id), np.insert(weights, at, 1)
        counts = np.maximum(counts, 1)
    csr = Csr(_offsets(counts), indices, weights)
    return csr if top_k is None else prune(csr, top_k)


@dataclass
class SparseVectors:
    """Quantised sparse vectors of R texts over a vocabulary of ``n_terms`` tokens.

    Attributes:
        ids: the texts' ids.
        indptr, indices, weights: the rows (see ``Csr``).
        vocabulary: the token strings by term id.
        extra: facts about their making (scale, side, tokenizer hash, …).
        fingerprint: of the artifact they were read from.
    """

    ids: Sequence[str]
    indptr: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    vocabulary: list[str]
    extra: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_terms(self) -> int:
        return len(self.vocabulary)

    @property
    def csr(self) -> Csr:
        return Csr(self.indptr, self.indices, self.weights)

    @property
    def n_postings(self) -> int:
        """P, the non-zero weights in all."""
        return len(self.indices)

    @cached_property
    def mean_active(self) -> float:
        """Mean number of terms per text."""
        return self.n_postings / max(len(self), 1)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Term ids and weights of row ``i``, as views."""
        start, end = self.indptr[i], self.indptr[i + 1]
        return self.indices[start:end], self.weights[start:end]

    def rows(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(id, term ids, weights) of every row, the arrays as views."""
        for i, name in enumerate(self.ids):
            yield name, *self.row(i)

    def pruned(self, top_k: int) -> SparseVectors:
        """The same texts with at most ``top_k`` terms each."""
        return SparseVectors(self.ids, *prune(self.csr, top_k), self.vocabulary, {**self.extra, "top_k": top_k})

    def subset(self, rows: Sequence[int]) -> SparseVectors:
        """Some of the texts, in the given order."""
        parts = [slice(self.indptr[row], self.indptr[row + 1]) for row in rows]
        ends = np.cumsum([0, *(part.stop - part.start for part in parts)]).astype(np.int64)
        indices, weights = (np.concatenate([values[:0], *(values[part] for part in parts)])
                            for values in (self.indices, self.weights))
        return SparseVectors([self.ids[row] for row in rows], ends, indices, weights, self.vocabulary, self.extra)

    def to_scipy(self) -> scipy.sparse.csr_array:
        """The matrix [R, V] with int64 weights."""
        import scipy.sparse

        return scipy.sparse.csr_array((self.weights.astype(np.int64), self.indices, self.indptr),
                                      shape=(len(self), self.n_terms))

    def save(self, path: str | Path, *, inputs: Mapping[str, str | Path] | None = None,
             config: Mapping[str, Any] | None = None, overwrite: bool = False) -> None:
        """Write the artifact ``path`` as one part."""
        with artifact.create(path, KIND, inputs=inputs, config=config, overwrite=overwrite) as draft:
            write_part(draft.path / part_name(0, 0), self.ids, *self.csr, n_terms=self.n_terms)
            write_vocabulary(draft.path, self.vocabulary)
            describe(draft, **self.extra)

    @classmethod
    def open(cls, path: str | Path, side: str | None = None) -> SparseVectors:
        """Read a finished artifact: memory-mapped where it has one part, else its parts joined in memory.

        Args:
            side: ``docs`` or ``queries``: refuse vectors of the other side.

        Raises:
            InputError: not a finished artifact of vectors, of the other side, damaged, with an id that occurs twice
                or a term that the vocabulary does not have.
        """
        path = Path(path)
        manifest = checks.opened(path, KIND, side)
        ids, csr = join(read_part(file) for file in part_files(path))
        if len(set(ids)) != len(ids):
            raise InputError(f"the id '{_first_repeated(ids)}' occurs more than once", path)
        vocabulary = read_vocabulary(path)
        checks.check_rows(ids, csr, len(vocabulary), path)
        return cls(ids, *csr, vocabulary, dict(manifest.extra), manifest.fingerprint)


def part_name(rank: int, number: int) -> str:
    """File name of part ``number`` of rank ``rank``."""
    return f"part-{rank:05d}-{number:05d}.arrow"


def part_files(folder: str | Path) -> list[Path]:
    """All parts in a folder, in reading order. InputError when there is none."""
    files = sorted(Path(folder).glob("part-*-*.arrow"))
    if not files:
        raise InputError("holds no part-*.arrow", folder)
    return files


def write_part(path: str | Path, ids: Sequence[str], indptr: np.ndarray, indices: np.ndarray, weights: np.ndarray, *,
               n_terms: int | None = None) -> None:
    """Write one part; the file appears only when it is complete. Arrays as in ``Csr``; checked against each other."""
    indptr = np.ascontiguousarray(indptr, dtype=np.int64)
    if len(indptr) != len(ids) + 1 or indptr[0] != 0 or not indptr[-1] == len(indices) == len(weights):
        raise ValueError(f"{len(ids)} ids, {len(indptr)} offsets, {len(indices)} terms, {len(weights)} weights "
                         "do not belong together")
    if n_terms is not None and len(indices) and not 0 <= indices.min() <= indices.max() < n_terms:
        raise ValueError(f"term ids reach from {indices.min()} to {indices.max()}, the vocabulary has {n_terms}")
    columns = [pa.array(ids, type=pa.large_string()),
               pa.LargeListArray.from_arrays(indptr, np.ascontiguousarray(indices, dtype=np.int32)),
               pa.LargeListArray.from_arrays(indptr, np.ascontiguousarray(weights, dtype=np.uint16))]
    batch = pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
    with artifact.atomic_file(path, "wb") as out, pa.ipc.new_file(out, _SCHEMA) as writer:
        writer.write_batch(batch)


def read_part(path: str | Path) -> tuple[list[str], Csr]:
    """Ids and rows of one part; the arrays are views of the memory-mapped file."""
    return join((ids.to_pylist(), csr) for ids, csr in read_batches(path))


def read_batches(path: str | Path) -> list[tuple[pa.Array, Csr]]:
    """The record batches of one part, ids as an Arrow array; views of the memory-mapped file."""
    try:
        with pa.ipc.open_file(pa.memory_map(str(path))) as table:
            foreign = [table.get_batch(i) for i in range(table.num_record_batches)] \
                if table.schema.types != _SCHEMA.types or table.schema.names != _SCHEMA.names else []
            for batch in foreign:  # of other programs: said more exactly than below
                batch.validate(full=True)
                checks.check_batch(batch, _SCHEMA, path)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise InputError(f"not an Arrow file, or a damaged one: {' '.join(str(error).split())}", path) from error
    return [_read_batch(batch, path) for batch in read_arrow(path, _SCHEMA)]


def _read_batch(batch: pa.RecordBatch, path: str | Path) -> tuple[pa.Array, Csr]:
    terms, weights = batch.column("terms"), batch.column("weights")
    if terms.values.null_count or weights.values.null_count:
        raise InputError("holds nulls", path)
    indptr = check_offsets(terms.offsets.to_numpy(), len(terms.values), path)
    if not np.array_equal(indptr, weights.offsets.to_numpy()) or len(weights.values) != len(terms.values):
        raise InputError(f"{len(terms.values)} terms and {len(weights.values)} weights do not belong together", path)
    return batch.column("id"), Csr(indptr, terms.values.to_numpy(), weights.values.to_numpy())


def join(pieces: Iterable[tuple[Sequence[str], Csr]]) -> tuple[list[str], Csr]:
    """One after the other as one; a single piece is passed through without a copy."""
    pieces = list(pieces)
    if len(pieces) == 1:
        return list(pieces[0][0]), pieces[0][1]
    ids = [name for names, _ in pieces for name in names]
    counts = [np.diff(csr.indptr) for _, csr in pieces]
    return ids, Csr(_offsets(np.concatenate(counts) if counts else np.zeros(0, np.int64)),
                    np.concatenate([csr.indices for _, csr in pieces] or [np.zeros(0, np.int32)]),
                    np.concatenate([csr.weights for _, csr in pieces] or [np.zeros(0, np.uint16)]))


def write_vocabulary(folder: str | Path, vocabulary: Sequence[str]) -> None:
    """Write ``vocabulary.json``."""
    with artifact.atomic_file(Path(folder) / VOCABULARY) as out:
        json.dump(list(vocabulary), out, ensure_ascii=False)


def read_vocabulary(folder: str | Path) -> list[str]:
    """Read ``vocabulary.json``: the token strings by term id."""
    return read_strings(Path(folder) / VOCABULARY)


def vocabularies_differ(here: Sequence[str], there: Sequence[str]) -> str:
    """How two vocabularies that are not equal differ, with both values, to be followed by a place for the second."""
    if len(here) != len(there):
        return f"it has {len(here)} tokens, but {len(there)}"
    differing = [i for i, (one, other) in enumerate(zip(here, there, strict=True)) if one != other]
    first = differing[0]
    return f"token {first} is {here[first]!r} ({len(differing)} of {len(here)} differ), but {there[first]!r}"


def describe(draft: artifact.Draft, **extra: Any) -> None:
    """Fill the counts and facts of a draft from the parts and the vocabulary that lie in it."""
    rows = postings = 0
    for file in part_files(draft.path):
        table = pa.ipc.open_file(pa.memory_map(str(file)))
        for i in range(table.num_record_batches):
            batch = table.get_batch(i)
            rows, postings = rows + batch.num_rows, postings + len(batch.column("terms").values)
    draft.counts.update(rows=rows, postings=postings)
    draft.extra.update({"scale": SCALE, **extra, "vocab_size": len(read_vocabulary(draft.path)),
                        "mean_active": round(postings / max(rows, 1), 3)})


def _first_repeated(ids: Iterable[str]) -> str:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            return name
        seen.add(name)
    return ""
