"""Changes of an exact index against an index built anew."""

from __future__ import annotations

import os

import numpy as np
import pytest
from launching import reseal

from lexmae import artifact
from lexmae.errors import InputError
from lexmae.retrieval import engines, segments, updates
from lexmae.retrieval.stored import StoredVectors
from lexmae.retrieval.vectors import SparseVectors, quantise, write_part

V = 40
VOCABULARY = [f"tok{i}" for i in range(V)]


def vectors(names, seed, side="docs", density=0.2, scale=3):
    """Scale 3 gives many equal scores."""
    rng = np.random.default_rng(seed)
    dense = rng.exponential(1.0, (len(names), V)) * (rng.random((len(names), V)) < density)
    return SparseVectors(list(names), *quantise(dense, 0, scale), VOCABULARY, {"side": side})


def subset(made, names):
    rows = {name: row for row, name in enumerate(made.ids)}
    parts = [made.row(rows[name]) for name in names]
    return SparseVectors(list(names), np.cumsum([0, *(len(terms) for terms, _ in parts)]),
                         np.concatenate([terms for terms, _ in parts]),
                         np.concatenate([weights for _, weights in parts]), VOCABULARY, made.extra)


@pytest.fixture
def names():
    return [f"d{i}" for i in np.random.default_rng(9).permutation(600)]


@pytest.fixture
def work(tmp_path, names):
    """An index of 400 documents; 200 others to add, and a file of deletions in both."""
    docs = vectors(names, 0)
    subset(docs, names[:400]).save(tmp_path / "first")
    subset(docs, names[400:]).save(tmp_path / "second")
    engines.build(tmp_path / "first", "exact", tmp_path / "i")
    (tmp_path / "ids").write_text("\n".join(names[350:450]) + "\n")
    return tmp_path


def files_of(folder):
    return artifact.read(folder).files


def test_added_and_deleted_equals_built_anew(work, names):
    docs, queries = vectors(names, 0), vectors([f"q{i}" for i in range(9)], 1, "queries")
    kept = names[:350] + names[450:]
    fresh = engines.build(subset(docs, kept), "exact", work / "fresh")
    updates.add(work / "i", work / "second")
    assert dict(engines.open_index(work / "i").search(queries, 50)) == dict(
        engines.build(docs, "exact", work / "all").search(queries, 50))
    updates.delete(work / "i", work / "ids")
    changed = engines.open_index(work / "i")
    artifact.verify(work / "i")
    for hits in (1, 7, 1000):
        assert dict(changed.search(queries, hits, threads=2)) == dict(fresh.search(queries, hits))
    assert (len(changed), changed.manifest.counts) == (500, fresh.manifest.counts)
    assert changed.manifest.extra["mean_active"] == fresh.manifest.extra["mean_active"]
    updates.compact(work / "i")
    artifact.verify(work / "i")
    assert files_of(work / "i") == files_of(work / "fresh")
    assert [list(entry)[0] for entry in artifact.read(work / "i").extra["history"]] == [
        "built", "added", "deleted", "compacted"]
    assert sorted(p.name for p in work.iterdir()) == ["all", "first", "fresh", "i", "ids", "second"]


def test_a_deleted_document_can_come_back_changed(work, names):
    (work / "one").write_text(names[0])
    updates.delete(work / "i", work / "one")
    vectors([names[0]], 77).save(work / "new")
    updates.add(work / "i", work / "new")
    docs = vectors(names[:400], 0)
    expected = subset(vectors(names, 0), names[1:400])
    both = SparseVectors([*expected.ids, names[0]], np.append(expected.indptr, len(expected.indices) + len(
        vectors([names[0]], 77).indices)), np.append(expected.indices, vectors([names[0]], 77).indices),
        np.append(expected.weights, vectors([names[0]], 77).weights), VOCABULARY, docs.extra)
    queries = vectors(["q"], 5, "queries")
    assert dict(engines.open_index(work / "i").search(queries, 400)) == dict(
        engines.build(both, "exact", work / "both").search(queries, 400))
    updates.compact(work / "i")
    assert files_of(work / "i") == files_of(work / "both")


def test_segments_that_stay_are_links_and_an_open_index_goes_on(work, names):
    queries = vectors(["q"], 5, "queries")
    opened = engines.open_index(work / "i")
    before, inode = dict(opened.search(queries, 20)), (work / "i/segment-0000/postings.npy").stat().st_ino
    updates.delete(work / "i", ids(work, names[:300]))
    assert (work / "i/segment-0000/postings.npy").stat().st_ino == inode
    updates.delete(work / "i", ids(work, names[300:310]))
    assert len(np.load(work / "i/segment-0000/deleted.npy")) == 310
    assert dict(opened.search(queries, 20)) == before


def test_a_link_to_an_index_stays_one(work, names):
    (work / "other").symlink_to(work / "i")
    updates.delete(work / "other", ids(work, names[:300]))
    updates.compact(work / "other")
    assert (work / "other").is_symlink() and len(engines.open_index(work / "i")) == 100


def ids(folder, names):
    (folder / "gone").write_text("\n".join(names))
    return folder / "gone"


def test_a_failed_change_leaves_the_old_index(work, monkeypatch, names):
    before = files_of(work / "i")
    monkeypatch.setattr(segments, "write", lambda *arguments: 1 / 0)
    for change in (lambda: updates.add(work / "i", work / "second"), lambda: updates.compact(work / "i")):
        with pytest.raises(ZeroDivisionError):
            change()
        assert files_of(work / "i") == before and not (work / "i.partial").exists()
    artifact.verify(work / "i")


def test_a_replacement_is_made_as_a_whole_or_not_at_all(work, names):
    before = files_of(work / "i")
    other = vectors([names[0]], 3)
    other.vocabulary = [*VOCABULARY[:-1], "other"]
    other.save(work / "other")
    vectors(names[:2], 3).save(work / "two")
    gone = ids(work, names[:1])
    for given, reason in (("other", "vocabulary differs"), ("two", f"'{names[1]}' is in .*i already"),
                          ("typo", "no such vectors")):
        with pytest.raises(InputError, match=reason):
            updates.replace(work / "i", gone, work / given)
        assert files_of(work / "i") == before
    vectors([names[0], "new"], 3).save(work / "good")
    updates.replace(work / "i", gone, work / "good")
    assert len(engines.open_index(work / "i")) == 401


def test_a_replacement_that_is_stopped_deletes_nothing(work, names, monkeypatch):
    before = files_of(work / "i")
    vectors([names[0]], 3).save(work / "new")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(segments, "write", lambda *arguments: 1 / 0)
        updates.replace(work / "i", ids(work, names[:1]), work / "new")
    assert files_of(work / "i") == before
    updates.replace(work / "i", ids(work, names[:1]), work / "new")
    assert list(artifact.read(work / "i").extra["history"][1]) == ["deleted", "added", "vectors"]


def test_all_documents_may_be_replaced(work, names):
    updates.replace(work / "i", ids(work, names[:400]), work / "second")
    assert len(engines.open_index(work / "i")) == 200
    updates.compact(work / "i")
    engines.build(work / "second", "exact", work / "anew")
    assert files_of(work / "i") == files_of(work / "anew")
    vectors([], 3).save(work / "none")
    with pytest.raises(InputError, match="names every document"):
        updates.replace(work / "i", ids(work, names[400:]), work / "none")


def test_without_hard_links_files_are_copied(work, monkeypatch, names):
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("not supported")))
    updates.delete(work / "i", ids(work, names[:5]))
    artifact.verify(work / "i")
    assert len(engines.open_index(work / "i")) == 395


def test_vectors_of_another_model_are_refused(tmp_path, names):
    for name, rows, letter in (("old", names[:9], "a"), ("new", names[9:12], "b"), ("same", names[12:15], "a")):
        made = vectors(rows, 3)
        made.extra["model"] = letter * 64
        made.save(tmp_path / name)
    engines.build(tmp_path / "old", "exact", tmp_path / "i")
    with pytest.raises(InputError, match="new: the model is b*, that of .*i is a*"):
        updates.add(tmp_path / "i", tmp_path / "new")
    updates.add(tmp_path / "i", tmp_path / "same")


def test_pruned_index_prunes_what_is_added(work, names):
    engines.build(work / "first", "exact", work / "p", top_k=3)
    updates.add(work / "p", work / "second")
    updates.compact(work / "p")
    vectors(names, 0).save(work / "all")
    engines.build(work / "all", "exact", work / "q", top_k=3)
    assert files_of(work / "p") == files_of(work / "q")


def test_refusals(work, names):
    with pytest.raises(InputError, match=f"'{names[0]}' is in .*i already; delete it first"):
        updates.add(work / "i", work / "first")
    with pytest.raises(InputError, match="gone:2: .*'nobody' is not in"):
        updates.delete(work / "i", ids(work, [names[0], "nobody"]))
    with pytest.raises(InputError, match="names every document"):
        updates.delete(work / "i", ids(work, names[:400]))
    other = vectors(["x"], 0)
    other.vocabulary = [*VOCABULARY[:-1], "other"]
    other.save(work / "other")
    with pytest.raises(InputError, match="vocabulary differs"):
        updates.add(work / "i", work / "other")
    with artifact.create(work / "lucene", "index") as draft:
        draft.extra["engine"] = "anserini"
    with pytest.raises(InputError, match="only exact ones can be changed"):
        updates.compact(work / "lucene")
    assert len(engines.open_index(work / "i")) == 400


@pytest.mark.parametrize(("section", "name", "value"), [
    ("extra", "engine", 7), ("extra", "vectors", 2.0), ("config", "top_k", "many"), ("extra", "history", "long")])
def test_facts_of_another_type_are_named(work, section, name, value):
    """Of a manifest whose own checksum is right."""
    reseal(work / "i", lambda record: record[section].update({name: value}))
    with pytest.raises(InputError, match=f"{section}: '{name}' is missing or not of the type"):
        engines.open_index(work / "i").search(SparseVectors.open(work / "second"), 3)
        updates.add(work / "i", work / "second")


@pytest.mark.parametrize("threads", [1, 3])
def test_parts_and_threads_change_no_byte(tmp_path, names, threads):
    """Several parts, many blocks; against one part in one thread."""
    docs = vectors(names, 0)
    with artifact.create(tmp_path / "v", "vectors") as draft:
        for number, first in enumerate(range(0, 600, 100)):
            part = subset(docs, names[first:first + 100])
            write_part(draft.path / f"part-00000-{number:05d}.arrow", part.ids, *part.csr)
        (draft.path / "vocabulary.json").write_text(str(VOCABULARY).replace("'", '"'))
    for top_k in (None, 2):
        stored, whole = StoredVectors.open(tmp_path / "v"), StoredVectors.of(docs)
        if top_k is not None:
            stored, whole = stored.pruned(top_k), docs.pruned(top_k)
        segments.write(stored, tmp_path / f"a{top_k}", threads, block=128)
        segments.write(StoredVectors.of(whole), tmp_path / f"b{top_k}", 1, block=128)
        for file in (tmp_path / f"a{top_k}").iterdir():
            assert file.read_bytes() == (tmp_path / f"b{top_k}" / file.name).read_bytes()


def test_an_id_in_two_parts_is_refused(tmp_path, names):
    docs = vectors(["a", "b"], 0)
    with artifact.create(tmp_path / "v", "vectors") as draft:
        for number in range(2):
            write_part(draft.path / f"part-00000-{number:05d}.arrow", docs.ids, *docs.csr)
        (draft.path / "vocabulary.json").write_text("[]")
    with pytest.raises(InputError, match="'a' occurs more than once"):
        StoredVectors.open(tmp_path / "v")
