"""What vectors must be before anything is computed with them: one clear line for each way of being wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lexmae import artifact, verification
from lexmae.errors import InputError

if TYPE_CHECKING:
    from lexmae.retrieval.vectors import Csr

_CHUNK = 1 << 24  # values looked at together


def opened(path: Path, kind: str, side: str | None) -> artifact.Manifest:
    """The manifest of vectors that are about to be used, verified; InputError where they are of another side."""
    manifest = verification.opened(path, kind)
    made_for = manifest.extra.get("side")
    if side is not None and made_for is not None and made_for != side:
        raise InputError(f"these are vectors of {made_for}, but vectors of {side} are needed here", path)
    return manifest


def differing(made: Mapping[str, Any], other: Mapping[str, Any], *keys: str) -> list[str]:
    """Those of ``keys`` that both sides know, with different values."""
    return [key for key in keys if made.get(key) is not None and other.get(key) not in (None, made[key])]


def refuse_other_making(docs: Mapping[str, Any], queries: Mapping[str, Any], path: Path | str) -> None:
    """InputError where the facts about the making of documents and of queries say that they do not belong together.

    Args:
        path: of the documents.
    """
    for key in differing(docs, queries, "tokenizer_hash", "scale", "representation"):
        raise InputError(f"its documents were encoded with the {key} {docs[key]}, the queries with {queries[key]}",
                         path)


def check_batch(batch: pa.RecordBatch, schema: pa.Schema, path: Path | str) -> None:
    """InputError where a batch of a part has other columns or types than ``schema``.

    Weights of another type come from other programs: the first that is not a number or is negative is named.
    """
    if batch.schema.names != schema.names:
        raise InputError(f"has the columns {', '.join(batch.schema.names)}, needed are {', '.join(schema.names)}", path)
    if batch.schema.types == schema.types:
        return
    for column, wanted in zip(batch.columns, schema, strict=True):
        if column.type == wanted.type:
            continue
        if wanted.name == "weights" and hasattr(column, "values"):
            _check_foreign_weights(batch, path)
        raise InputError(f"its column {wanted.name} is of type {column.type}, needed is {wanted.type}", path)


def _check_foreign_weights(batch: pa.RecordBatch, path: Path | str) -> None:
    column = batch.column("weights")
    try:
        values = column.values.to_numpy(zero_copy_only=False).astype(np.float64)
    except (TypeError, ValueError):
        return
    for wrong, what in ((~np.isfinite(values), "is not a finite number"), (values < 0, "is negative")):
        if wrong.any():
            at = int(np.argmax(wrong))
            row = int(np.searchsorted(column.offsets.to_numpy(), at, side="right")) - 1
            raise InputError(f"a weight of '{batch.column('id')[row].as_py()}' {what} ({values[at]:g}); weights are "
                             "whole numbers from 1 to 65535", path)


def check_rows(ids: Sequence[str], csr: Csr, n_terms: int, path: Path | str) -> None:
    """InputError where rows and postings do not belong together, or a term is not in the vocabulary."""
    indptr, indices, weights = csr
    fits = len(indptr) == len(ids) + 1 and len(indices) == len(weights) and indptr[0] == 0
    if not fits or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any():
        raise InputError(f"{len(ids)} ids, {len(indices)} terms and {len(weights)} weights do not belong together",
                         path)
    for start in range(0, len(indices), _CHUNK):
        part = indices[start:start + _CHUNK]
        if part.min() < 0 or part.max() >= n_terms:
            at = start + int(np.argmax((part < 0) | (part >= n_terms)))
            row = int(np.searchsorted(indptr, at, side="right")) - 1
            raise InputError(f"'{ids[row]}' has the term {indices[at]}, but the vocabulary has {n_terms} entries "
                             f"(0 to {n_terms - 1})", path)


def check_matrix(matrix: np.ndarray, ids: Sequence[str], path: Path | str) -> None:
    """InputError where a matrix float32 [R, H] does not belong to R ids, or holds what is no finite number."""
    if len(matrix) != len(ids):
        raise InputError(f"has {len(matrix)} rows for {len(ids)} ids", path)
    step = max(1, _CHUNK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        good = np.isfinite(matrix[start:start + step]).all(axis=1)
        if not good.all():
            raise InputError(f"the vector of '{ids[start + int(np.argmin(good))]}' holds a value that is not a finite "
                             "number", path)
