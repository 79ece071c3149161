"""Encoding: equal to the encoder text by text, and a run that was stopped ends like one that was not."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_model
from threads import thread_hosts

from lexmae import artifact
from lexmae.errors import InputError
from lexmae.model.encoder import SparseEncoder
from lexmae.retrieval import blocks, encode, vectors
from lexmae.retrieval.encode import EncodeConfig
from lexmae.retrieval.vectors import SparseVectors

ROOT = Path(__file__).parents[1]
DOCS = EncodeConfig("docs", batch_tokens=100)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three parts for the 41 documents."""
    monkeypatch.setattr(encode, "BLOCK", 16)


@pytest.fixture(scope="module")
def expected(model_dir, tiny_shards) -> dict[str, list[tuple[int, int]]]:
    """(term, weight) of every document and query, one text at a time, rounded in plain Python."""
    encoder = SparseEncoder.load(model_dir, head="reference").eval()
    found = {}
    for table in (tiny_shards.docs, tiny_shards.queries("train"), tiny_shards.queries("dev")):
        for row, name in enumerate(table.ids()):
            ids = torch.from_numpy(table.tokens(row).astype(np.int64))[None]
            types = (torch.arange(ids.shape[1]) >= table.first_length(row)).long()[None]
            text = ~torch.isin(ids, torch.tensor(tiny_shards.special.structural))
            with torch.inference_mode():
                values = encoder(ids, torch.ones_like(ids), text, types)[0]
            weights = [(term, round(float(np.float32(value) * np.float32(100)))) for term, value in enumerate(values)]
            found[name] = [(t, w) for t, w in weights if w] or [(tiny_shards.special.unk, 1)]
    return found


def rows(found: SparseVectors) -> dict[str, list[tuple[int, int]]]:
    return {name: list(zip(terms.tolist(), weights.tolist(), strict=True)) for name, terms, weights in found.rows()}


def close(found: dict, expected: dict) -> bool:
    """Equal but for values that lie so near a half that the order of additions decides."""
    for name in found:
        one, other = dict(found[name]), dict(expected[name])
        if any(abs(one.get(t, 0) - other.get(t, 0)) > 1 for t in one.keys() | other.keys()):
            return False
    changed = sum(dict(found[n]) != dict(expected[n]) for n in found)
    return changed <= 1 + len(found) // 20


@pytest.mark.parametrize(("kind", "known", "expected"), [("cuda", True, "bf16"), ("cuda", False, "fp32"),
                                                         ("cpu", True, "fp32")])
def test_bf16_is_chosen_where_a_gpu_has_it(kind, known, expected, monkeypatch):
    """torch also calls it supported where it is emulated, slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: known or including_emulation)
    assert blocks.precision("auto", torch.device(kind)) == expected
    assert blocks.precision("fp16", torch.device(kind)) == "fp16"


def test_documents_are_what_the_encoder_gives_one_by_one(model_dir, shards_dir, tiny_shards, expected, tmp_path):
    encode.encode(model_dir, shards_dir, tmp_path / "v", DOCS)
    found = SparseVectors.open(tmp_path / "v", side="docs")
    assert list(found.ids) == tiny_shards.docs.ids() and close(rows(found), expected)
    assert found.vocabulary == tiny_shards.vocabulary()
    assert len(list((tmp_path / "v").glob("part-*.arrow"))) == 3
    manifest = artifact.read(tmp_path / "v", "vectors")
    assert manifest.counts == {"rows": 41, "postings": sum(map(len, rows(found).values()))}
    assert manifest.inputs["model"]["fingerprint"] == artifact.read(model_dir).fingerprint
    assert manifest.inputs["shards"]["fingerprint"] == tiny_shards.manifest.fingerprint
    assert manifest.extra["side"] == "docs" and manifest.extra["scale"] == 100
    assert manifest.extra["tokenizer_hash"] == tiny_shards.manifest.extra["tokenizer_hash"]
    artifact.verify(tmp_path / "v")


@pytest.mark.parametrize("split, count", [("train", 13), ("dev", 5)])
def test_queries_of_a_split(model_dir, shards_dir, tiny_shards, expected, tmp_path, split, count):
    encode.encode(model_dir, shards_dir, tmp_path / "v", EncodeConfig("queries", split, batch_tokens=100))
    found = SparseVectors.open(tmp_path / "v", side="queries")
    assert list(found.ids) == tiny_shards.queries(split).ids() and len(found) == count
    assert close(rows(found), expected)


def test_top_k_keeps_the_largest(model_dir, shards_dir, expected, tmp_path):
    encode.encode(model_dir, shards_dir, tmp_path / "v", EncodeConfig("docs", top_k=5, batch_tokens=100))
    for name, kept in rows(SparseVectors.open(tmp_path / "v")).items():
        best = sorted(expected[name], key=lambda pair: (-pair[1], pair[0]))[:5]
        assert len(kept) == len(best)
        assert all(abs(a - b) <= 1 for a, b in zip(sorted(w for _, w in kept), sorted(w for _, w in best), strict=True))


@pytest.mark.parametrize("batch_tokens", [1, 64, 10000])
def test_the_size_of_batches_changes_nothing(model_dir, shards_dir, expected, tmp_path, batch_tokens):
    encode.encode(model_dir, shards_dir, tmp_path / "v", EncodeConfig("docs", batch_tokens=batch_tokens))
    assert close(rows(SparseVectors.open(tmp_path / "v")), expected)


def test_the_size_of_batches_hardly_changes_the_values(model_dir, tiny_shards, tmp_path):
    """Within 1e-3 of each other in float32, before rounding."""
    encoder, found = SparseEncoder.load(model_dir).eval(), []
    for batch_tokens in (1, 64, 10000):
        job = encode.TextJob(encoder, tiny_shards, tiny_shards.docs, tmp_path, EncodeConfig("docs", None, None,
                                                                                           batch_tokens))
        values = np.empty((16, tiny_shards.vocab_size), np.float32)
        for batch in job.batches(1):
            with torch.inference_mode():
                values[batch] = job.compute(job.read(1, batch)).numpy()
        found.append(values)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("top_k, threshold", [(None, 0.4), (3, None), (4, 0.7)])
def test_a_threshold_leaves_small_weights_out(model_dir, shards_dir, expected, tmp_path, top_k, threshold):
    config = EncodeConfig("docs", top_k=top_k, batch_tokens=100, threshold=threshold)
    encode.encode(model_dir, shards_dir, tmp_path / "v", config)
    found = SparseVectors.open(tmp_path / "v")
    assert found.weights.min() >= (threshold or 0) * 100 and found.extra["threshold"] == threshold
    wanted = {name: sorted([p for p in pairs if p[1] >= (threshold or 0) * 100], key=lambda p: (-p[1], p[0]))[:top_k]
              for name, pairs in expected.items() if name.startswith("d")}
    same = sum(set(pairs) == set(wanted[name]) for name, pairs in rows(found).items())
    assert same >= len(found) - 3  # but for roundings that the order of additions decides


@pytest.mark.parametrize("top_k", [None, 1, 7, 300])
@pytest.mark.parametrize("threshold", [None, 0.5, 0.29])
def test_what_is_selected_on_the_device_is_what_quantise_keeps(top_k, threshold):
    random = np.random.default_rng(1)
    values = (random.exponential(1.0, (20, 300)) * (random.random((20, 300)) < 0.4)).astype(np.float32)
    values[:5] = np.round(values[:5], 1)  # equal weights
    values[7], values[8, 0] = 0, 700  # nothing; more than 16 bits
    counts, terms, weights, good = (t.numpy() for t in encode.select(torch.from_numpy(values), top_k, threshold))
    least = 0.0 if threshold is None else round(threshold * 100)
    wanted = vectors.quantise(np.where(np.rint(values * np.float32(100)) >= least, values, 0), 9, top_k=top_k)
    for one, other in zip(vectors.pack(counts, terms, weights, 9, top_k), wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert good.all() and 9 in wanted.indices[wanted.indptr[7]:wanted.indptr[8]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_bad_vector_names_its_text(model_dir, shards_dir, tmp_path, monkeypatch, bad):
    compute = encode.TextJob.compute

    def spoilt(self, batch):
        values = compute(self, batch).clone()
        values[-1, 5] = bad
        return values

    monkeypatch.setattr(encode.TextJob, "compute", spoilt)
    with pytest.raises(InputError, match=r"gives 'd\d+' a vector that is not finite"):
        encode.encode(model_dir, shards_dir, tmp_path / "v", DOCS)
    assert not list((tmp_path / "v.partial").glob("*.arrow"))


def test_batches_hold_every_text_once_and_fit(tiny_shards):
    lengths = tiny_shards.docs.lengths
    batches = list(blocks.by_length(lengths, 100))
    assert sorted(np.concatenate(batches).tolist()) == list(range(41))
    assert all(len(b) * lengths[b].max() <= 100 for b in batches)
    assert [len(b) for b in blocks.by_length(np.array([7, 9]), 1)] == [1, 1]


# --------------------------------------------------------------------------------------------------- stopping


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*")) if p.name != artifact.MANIFEST}


@pytest.fixture
def whole(model_dir, shards_dir, tmp_path) -> Path:
    """The result of a run that was not stopped."""
    encode.encode(model_dir, shards_dir, tmp_path / "whole", DOCS)
    return tmp_path / "whole"


class Stopped(Exception):
    pass


def interrupt(monkeypatch, after: int) -> None:
    """Let so many batches through before the run is stopped."""
    compute, seen = encode.TextJob.compute, []

    def limited(*args):
        if len(seen) == after:
            raise Stopped
        seen.append(None)
        return compute(*args)

    monkeypatch.setattr(encode.TextJob, "compute", limited)
    return seen


def test_a_stopped_run_goes_on_with_what_is_missing(model_dir, shards_dir, tmp_path, monkeypatch, whole):
    partial, parts = tmp_path / "v.partial", []
    for _ in range(5):
        with monkeypatch.context() as patch:
            interrupt(patch, 6)
            try:
                encode.encode(model_dir, shards_dir, tmp_path / "v", DOCS)
                break
            except Stopped:
                assert not (tmp_path / "v").exists()
                parts.append(len(list(partial.glob("part-*.arrow"))))
    assert parts == [1, 2]  # a part of 16 texts takes 4 to 6 batches
    assert content(tmp_path / "v") == content(whole) and not partial.exists()
    assert artifact.read(tmp_path / "v").fingerprint == artifact.read(whole).fingerprint


def stop_early(model_dir, shards_dir, output: Path, monkeypatch, config: EncodeConfig = DOCS) -> Path:
    """A run stopped after its first part; returns what it left."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        interrupt(patch, 6)
        encode.encode(model_dir, shards_dir, output, config)
    assert [p.name for p in artifact.partial_path(output).glob("*.arrow")] == [vectors.part_name(0, 0)]
    return artifact.partial_path(output)


def test_finished_parts_are_not_made_again(model_dir, shards_dir, tmp_path, monkeypatch, whole):
    part = stop_early(model_dir, shards_dir, tmp_path / "v", monkeypatch) / vectors.part_name(0, 0)
    shutil.copy(whole / vectors.part_name(0, 2), part)  # to be found again in the result
    encode.encode(model_dir, shards_dir, tmp_path / "v", DOCS)
    assert content(tmp_path / "v")[part.name] == content(whole)[vectors.part_name(0, 2)]


def test_what_a_killed_run_was_writing_does_not_stay(model_dir, shards_dir, tmp_path, monkeypatch, whole):
    partial = stop_early(model_dir, shards_dir, tmp_path / "v", monkeypatch)
    (partial / f".{vectors.part_name(0, 1)}.a1b2c3").write_bytes(b"half")
    encode.encode(model_dir, shards_dir, tmp_path / "v", DOCS)
    assert artifact.read(tmp_path / "v").fingerprint == artifact.read(whole).fingerprint


def other_model(path: Path, shards_dir: Path) -> Path:
    return write_model(path, shards_dir, seed=1)


@pytest.mark.parametrize("change", ["top_k", "threshold", "model", "side", "block", "nothing known"])
def test_what_was_begun_otherwise_is_discarded(model_dir, shards_dir, tmp_path, monkeypatch, change, capsys):
    model, config = model_dir, DOCS
    partial = stop_early(model_dir, shards_dir, tmp_path / "v", monkeypatch)
    (partial / "mark").write_text("")
    if change == "top_k":
        config = EncodeConfig("docs", top_k=3, batch_tokens=100)
    elif change == "threshold":
        config = EncodeConfig("docs", batch_tokens=100, threshold=0.5)
    elif change == "model":
        model = other_model(tmp_path / "other", shards_dir)
    elif change == "side":
        config = EncodeConfig("queries", "dev", batch_tokens=100)
    elif change == "block":
        monkeypatch.setattr(encode, "BLOCK", 7)
    else:
        (partial / "begun.json").unlink()
    encode.encode(model, shards_dir, tmp_path / "v", config)
    encode.encode(model, shards_dir, tmp_path / "fresh", config)
    assert content(tmp_path / "v") == content(tmp_path / "fresh")
    assert "was begun from other inputs" in capsys.readouterr().err


def test_a_model_of_others_that_has_changed_is_another(shards_dir, model_dir, tmp_path, monkeypatch, capsys):
    plain = tmp_path / "plain"
    shutil.copytree(model_dir, plain)
    (plain / artifact.MANIFEST).unlink()
    stop_early(plain, shards_dir, tmp_path / "v", monkeypatch)
    shutil.copy(other_model(tmp_path / "other", shards_dir) / "model.safetensors", plain)
    encode.encode(plain, shards_dir, tmp_path / "v", DOCS)
    encode.encode(tmp_path / "other", shards_dir, tmp_path / "fresh", DOCS)
    assert content(tmp_path / "v") == content(tmp_path / "fresh")
    assert "was begun from other inputs" in capsys.readouterr().err


def test_a_run_that_is_stopped_at_the_very_end_encodes_nothing_again(model_dir, shards_dir, tmp_path, monkeypatch,
                                                                      whole):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(artifact, "fsync", lambda path: (_ for _ in ()).throw(Stopped))
        encode.encode(model_dir, shards_dir, tmp_path / "v", DOCS)
    monkeypatch.setattr(SparseEncoder, "forward", lambda *arguments, **more: 1 / 0)
    encode.encode(model_dir, shards_dir, tmp_path / "v", DOCS)
    assert artifact.read(tmp_path / "v").fingerprint == artifact.read(whole).fingerprint
    artifact.verify(tmp_path / "v")
    assert not (tmp_path / "v" / blocks.STATE).exists()


def test_another_tokenizer_is_refused(shards_dir, tmp_path):
    model = write_model(tmp_path / "model", shards_dir, tokenizer_hash="0" * 64)
    with pytest.raises(InputError, match="trained with another tokenizer"):
        encode.encode(model, shards_dir, tmp_path / "v", DOCS)
    assert not (tmp_path / "v.partial").exists()


def test_a_plain_model_folder_is_taken_as_it_is(model_dir, shards_dir, tmp_path, whole):
    plain = tmp_path / "plain"
    shutil.copytree(model_dir, plain)
    (plain / artifact.MANIFEST).unlink()
    encode.encode(plain, shards_dir, tmp_path / "v", DOCS)
    assert artifact.read(tmp_path / "v").fingerprint == artifact.read(whole).fingerprint
    assert artifact.read(tmp_path / "v").extra["model"] == artifact.read(model_dir).fingerprint


def test_refusals_before_the_first_text(model_dir, shards_dir, tmp_path, whole):
    with pytest.raises(InputError, match="no queries of the split 'test'; it has dev, train"):
        encode.encode(model_dir, shards_dir, tmp_path / "v", EncodeConfig("queries", "test"))
    with pytest.raises(InputError, match="already exists"):
        encode.encode(model_dir, shards_dir, whole, DOCS)
    with pytest.raises(InputError, match="no such model folder"):
        encode.encode(tmp_path / "absent", shards_dir, tmp_path / "v", DOCS)
    with pytest.raises(InputError, match="no such shards"):
        encode.encode(model_dir, tmp_path / "absent", tmp_path / "v", DOCS)
    assert not (tmp_path / "v").exists()


def test_overwriting_replaces_a_finished_output(model_dir, shards_dir, tmp_path, whole):
    before = artifact.read(whole).fingerprint
    encode.encode(model_dir, shards_dir, whole, EncodeConfig("docs", top_k=2, batch_tokens=100), overwrite=True)
    assert artifact.read(whole).fingerprint != before and artifact.read(whole).extra["top_k"] == 2


@pytest.mark.parametrize("config", [DOCS, EncodeConfig("docs", None, 4, 57, threshold=0.2)])
@pytest.mark.parametrize("world", [2, 4])  # of four ranks one has nothing to do
def test_ranks_as_threads_make_what_one_makes(model_dir, shards_dir, tmp_path, monkeypatch, world, config):
    encode.encode(model_dir, shards_dir, tmp_path / "whole", config)
    local, barrier = threading.local(), threading.Barrier(world)

    @contextlib.contextmanager
    def ranks():
        yield local.rank, world, torch.device("cpu")

    monkeypatch.setattr(blocks, "ranks", ranks)
    monkeypatch.setattr(blocks, "is_main_rank", lambda: local.rank == 0)
    monkeypatch.setattr(blocks, "Hosts", thread_hosts(local, barrier))
    encoder = SparseEncoder.load(model_dir)  # transformers cannot load in several threads at once
    monkeypatch.setattr(encode.SparseEncoder, "load", lambda *_, **__: encoder)

    def work(rank: int) -> None:
        local.rank = rank
        encode.encode(model_dir, shards_dir, tmp_path / "v", config)

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(work, range(world)))
    assert content(tmp_path / "v") == content(tmp_path / "whole")


RANKS = """
import sys
from lexmae.retrieval import encode
encode.BLOCK = 16
encode.encode(*sys.argv[1:4], encode.EncodeConfig("docs", batch_tokens=100))
"""


@pytest.mark.slow
def test_ranks_as_processes_make_what_one_makes(model_dir, shards_dir, tmp_path, whole):
    program = tmp_path / "ranks.py"
    program.write_text(RANKS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = [subprocess.Popen([sys.executable, str(program), str(model_dir), str(shards_dir), str(tmp_path / "v")],
                                cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
                                     "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
               for rank in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    assert artifact.read(tmp_path / "v").fingerprint == artifact.read(whole).fingerprint
