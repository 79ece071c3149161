"""Changes of an exact index: add document vectors, delete ids, compact.

Each makes a new version of the artifact beside the old one and puts it in its place when it is complete. Segments
that stay as they are become hard links, so that the work is that of the change. Two changes at a time are refused
(``lexmae.locks``); searches go on with the version they have opened. What is found, and in which order, is
what an index built anew from the same documents finds; after ``compact`` the files are the same too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lexmae import artifact, locks, remembered, verification
from lexmae.data.lines import read_lines
from lexmae.errors import InputError
from lexmae.retrieval import checks, segments
from lexmae.retrieval.engines import KIND
from lexmae.retrieval.stored import StoredVectors
from lexmae.retrieval.vectors import VOCABULARY, Csr, read_vocabulary, vocabularies_differ


def add(index: str | Path, vectors: str | Path, threads: int | None = None) -> artifact.Manifest:
    """Add the documents of an artifact of vectors as a segment; pruned as the index was (``top_k``).

    Raises:
        InputError: an id is in the index already, or the vectors were encoded otherwise than its documents, such as
            with another model.
    """
    index = Path(index)
    with locks.writing(index):
        manifest = _read(index)
        new = _new_documents(manifest, vectors)
        with _revision(manifest, lambda name: True, inputs={"vectors": vectors}, change=_added(new)) as draft:
            _write_segment(draft, index, new, threads)
        return artifact.read(index, KIND)


def replace(index: str | Path, ids: str | Path, vectors: str | Path, threads: int | None = None) -> artifact.Manifest:
    """Delete the documents of ``ids`` and add those of ``vectors`` in one change: both are done, or neither.

    Raises:
        InputError: as ``delete`` and ``add``.
    """
    index = Path(index)
    with locks.writing(index):
        manifest = _read(index)
        new = _new_documents(manifest, vectors, [name for _, name in read_lines(ids)])
        gone = _Deletion(index, ids, replaced=len(new) > 0)
        with _revision(manifest, gone.keeps, inputs={"ids": ids, "vectors": vectors},
                       change={"deleted": gone.count, **_added(new)}) as draft:
            gone.mark(draft)
            _write_segment(draft, index, new, threads)
        return artifact.read(index, KIND)


def _new_documents(manifest: artifact.Manifest, vectors: str | Path, gone: Sequence[str] = ()) -> StoredVectors:
    """Vectors that may be added to an index when the documents ``gone`` have left it, pruned as those are."""
    index, new = manifest.path, StoredVectors.open(vectors, side="docs")
    _check_same_encoder(manifest, new, vectors)
    known = pc.is_in(new.id_array, value_set=segments.number_documents(segments.open_segments(index))[0])
    known = pc.and_not(known, pc.is_in(new.id_array, value_set=pa.array(gone, pa.large_string())))
    if pc.any(known).as_py():
        name = new.id_array[pc.index(known, True).as_py()]
        raise InputError(f"the document '{name}' is in {index} already; delete it first to replace it", vectors)
    return new if manifest.config.get("top_k") is None else new.pruned(manifest.fact("top_k", int, "config"))


def _added(new: StoredVectors) -> dict[str, object]:
    return {"added": len(new), "vectors": new.fingerprint}


def _write_segment(draft: artifact.Draft, index: Path, new: StoredVectors, threads: int | None) -> None:
    """The new documents behind the segments of the index."""
    number = int(sorted(index.glob("segment-*"))[-1].name.split("-")[1]) + 1
    segments.write(new, draft.path / segments.segment_name(number), threads)
    _count(draft, len(new), new.n_postings)


def delete(index: str | Path, ids: str | Path) -> artifact.Manifest:
    """Delete the documents whose ids stand in the file ``ids``, one a line. They keep their space until ``compact``.

    Raises:
        InputError: an id is not in the index, or no document would be left.
    """
    index = Path(index)
    with locks.writing(index):
        manifest, gone = _read(index), _Deletion(index, ids)
        with _revision(manifest, gone.keeps, inputs={"ids": ids}, change={"deleted": gone.count}) as draft:
            gone.mark(draft)
        return artifact.read(index, KIND)


class _Deletion:
    """Documents that are to leave an index.

    Args:
        ids: file of their ids, one a line.
        replaced: others come in the same change, so that all may go.

    Raises:
        InputError: as ``delete``.
    """

    def __init__(self, index: Path, ids: str | Path, replaced: bool = False):
        self.segments = segments.open_segments(index)
        asked = dict.fromkeys(name for _, name in read_lines(ids))
        everything, numbers = segments.number_documents(self.segments)
        place = pc.index_in(pa.array(list(asked), pa.large_string()), value_set=everything)
        if place.null_count:
            missing = list(asked)[pc.index(pc.is_null(place), True).as_py()]
            line = next(number for number, name in read_lines(ids) if name == missing)
            raise InputError(f"the document '{missing}' is not in {index}", ids, line)
        if len(asked) == len(everything) and not replaced:
            raise InputError("names every document: an index without any cannot be searched", ids)
        gone = np.zeros(len(everything), bool)
        gone[place.to_numpy(zero_copy_only=False).astype(np.int64)] = True
        self.count = len(asked)
        self.chosen = [(numbers_of >= 0) & gone[numbers_of] for numbers_of in numbers]
        self.folders = [folder.name for folder in sorted(index.glob("segment-*"))]
        self._replaced = {f"{folder}/{segments.DELETED}"
                          for folder, chosen in zip(self.folders, self.chosen, strict=True) if chosen.any()}

    def keeps(self, name: str) -> bool:
        """Whether a file of the index stays as it is."""
        return name not in self._replaced

    def mark(self, draft: artifact.Draft) -> None:
        """Note in the new version what is deleted."""
        for folder, segment, chosen in zip(self.folders, self.segments, self.chosen, strict=True):
            if chosen.any():
                np.save(draft.path / folder / segments.DELETED,
                        np.flatnonzero(~segment.live | chosen).astype(np.int32))
                _count(draft, -int(chosen.sum()), -_postings_of(segment, chosen))


def compact(index: str | Path, threads: int | None = None) -> artifact.Manifest:
    """Write the documents that are not deleted as one segment: the same files as an index built of them anew."""
    with locks.writing(index):
        return _compact(Path(index), threads)


def _compact(index: Path, threads: int | None) -> artifact.Manifest:
    manifest = _read(index)
    with _revision(manifest, lambda name: name == VOCABULARY, inputs={}, change={"compacted": True}) as draft:
        spill = draft.path / "rows"
        spill.mkdir()
        parts = [_spilled(segment, spill / str(number)) for number, segment in enumerate(segments.open_segments(index))]
        merged = StoredVectors(parts, read_vocabulary(index))
        segments.write(merged, draft.path / segments.segment_name(0), threads)
        shutil.rmtree(spill)
    return artifact.read(index, KIND)


def _read(index: Path) -> artifact.Manifest:
    manifest = verification.opened(index, KIND)
    if (engine := manifest.fact("engine", str)) != "exact":
        raise InputError(f"is an index of the engine {engine}; only exact ones can be changed", index)
    return manifest


def _check_same_encoder(manifest: artifact.Manifest, new: StoredVectors, path: str | Path) -> None:
    if new.vocabulary != read_vocabulary(manifest.path):
        raise InputError("the vocabulary differs: "
                         f"{vocabularies_differ(new.vocabulary, read_vocabulary(manifest.path))} in {manifest.path}",
                         path)
    made = manifest.fact("vectors", dict, default={})
    for key in checks.differing(made, new.extra, "tokenizer_hash", "scale", "max_length", "model"):
        raise InputError(f"the {key} is {new.extra[key]}, that of {manifest.path} is {made[key]}", path)


@contextlib.contextmanager
def _revision(manifest: artifact.Manifest, keep: Callable[[str], bool], *, inputs: dict, change: dict
              ) -> Iterator[artifact.Draft]:
    """A draft that replaces the index: begins with its facts and hard links to those of its files that ``keep``."""
    history = [*manifest.fact("history", list, default=[{"built": dict(manifest.inputs)}]), change]
    with artifact.create(manifest.path, KIND, inputs=inputs, config=manifest.config, overwrite=True) as draft:
        draft.counts.update(manifest.counts)
        draft.extra.update({**manifest.extra, "history": history})
        verified = remembered.unchanged(manifest.path, manifest.files)
        for name, digest in manifest.files.items():
            if not keep(name):
                continue
            target = draft.path / name
            target.parent.mkdir(exist_ok=True)
            try:
                os.link(manifest.path / name, target)
                draft.verified.update({name: verified[name]} if name in verified else {})
            except OSError:  # a file system without hard links
                shutil.copy2(manifest.path / name, target)
            draft.known[name] = digest
        yield draft


def _count(draft: artifact.Draft, rows: int, postings: int) -> None:
    draft.counts["rows"] += rows
    draft.counts["postings"] += postings
    draft.extra["mean_active"] = round(draft.counts["postings"] / max(draft.counts["rows"], 1), 3)


def _postings_of(segment: segments.Segment, chosen: np.ndarray) -> int:
    """How many postings the chosen documents (bool [D]) have."""
    total = 0
    for number, starts in enumerate(segment.starts):
        block = chosen[number * segment.block:(number + 1) * segment.block]
        if block.any():
            total += int(block[segment.postings[starts[0]:starts[-1]] & 0xFFFF].sum())
    return total


def _spilled(segment: segments.Segment, path: Path) -> tuple[pa.Array, Csr]:
    """Ids and rows of the documents that are not deleted, the rows in files at ``path`` and mapped from there."""
    counts = [np.zeros(1, np.int64)]
    with open(f"{path}.terms", "wb") as terms, open(f"{path}.weights", "wb") as weights:
        for rows in segment.rows():
            counts.append(np.diff(rows.indptr))
            rows.indices.tofile(terms)
            rows.weights.tofile(weights)
    indptr = np.cumsum(np.concatenate(counts))
    ids = segment.ids.filter(pa.array(segment.live))
    if indptr[-1] == 0:
        return ids, Csr(indptr, np.empty(0, np.int32), np.empty(0, np.uint16))
    return ids, Csr(indptr, np.memmap(f"{path}.terms", np.int32, "r"), np.memmap(f"{path}.weights", np.uint16, "r"))
