"""Dense vectors: equal to the model's own parts text by text; stopped runs; what is damaged is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from threads import thread_hosts

from lexmae import artifact, verification
from lexmae.errors import InputError
from lexmae.model.dense import DenseEncoder
from lexmae.retrieval import blocks, dense, encode, encode_dense
from lexmae.retrieval.dense import DenseVectors
from lexmae.retrieval.encode import EncodeConfig
from lexmae.retrieval.vectors import SparseVectors

DOCS = EncodeConfig("docs", batch_tokens=100)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three parts for the 41 documents."""
    monkeypatch.setattr(encode, "BLOCK", 16)


@pytest.fixture(scope="module")
def expected(model_dir, tiny_shards) -> dict[str, np.ndarray]:
    """`bottleneck`, `cls`, `mean` [R, H] of the documents through Hugging Face's own forward pass, one by one."""
    from transformers import AutoModelForMaskedLM

    lm = AutoModelForMaskedLM.from_pretrained(model_dir).eval()
    found: dict[str, list] = {"bottleneck": [], "cls": [], "mean": []}
    for row in range(len(tiny_shards.docs)):
        ids = torch.from_numpy(tiny_shards.docs.tokens(row).astype(np.int64))[None]
        types = (torch.arange(ids.shape[1]) >= tiny_shards.docs.first_length(row)).long()[None]
        text = ~torch.isin(ids, torch.tensor(tiny_shards.special.structural))[0]
        with torch.inference_mode():
            out = lm(input_ids=ids, token_type_ids=types, output_hidden_states=True)
        weights = torch.softmax(out.logits[0][text].max(0).values, -1)
        found["bottleneck"].append((weights @ lm.get_input_embeddings().weight).detach().numpy())
        found["cls"].append(out.hidden_states[-1][0, 0].numpy())
        mean = out.hidden_states[-1][0].mean(0).numpy()
        found["mean"].append(mean / np.linalg.norm(mean))
    return {name: np.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("representation", ["bottleneck", "cls", "mean"])
def test_documents_are_what_the_model_gives_one_by_one(model_dir, shards_dir, tiny_shards, expected, tmp_path,
                                                       representation):
    encode_dense.encode(model_dir, shards_dir, tmp_path / "v", DOCS, representation)
    found = DenseVectors.open(tmp_path / "v", side="docs")
    assert list(found.ids) == tiny_shards.docs.ids() and found.matrix.dtype == np.float32
    np.testing.assert_allclose(found.matrix, expected[representation], atol=2e-6)
    manifest = artifact.read(tmp_path / "v", "dense")
    assert manifest.counts == {"rows": 41} and manifest.extra["dimensions"] == found.dimensions == 16
    assert manifest.extra["representation"] == representation and manifest.extra["side"] == "docs"
    assert manifest.extra["tokenizer_hash"] == tiny_shards.manifest.extra["tokenizer_hash"]
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == ["ids.arrow", "manifest.json", "matrix.npy"]


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_with_what_is_missing(model_dir, shards_dir, tmp_path, monkeypatch):
    encode_dense.encode(model_dir, shards_dir, tmp_path / "whole", DOCS, "cls")
    real, calls = DenseEncoder.forward, []

    def limited(self, **arguments):
        if len(calls) == 6:
            raise Stopped
        calls.append(1)
        return real(self, **arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(DenseEncoder, "forward", limited)
        encode_dense.encode(model_dir, shards_dir, tmp_path / "v", DOCS, "cls")
    part = tmp_path / "v.partial" / encode_dense.part_name(0)
    assert part.exists() and not (tmp_path / "v").exists()
    np.save(part, np.load(part) + 1)  # to be found again in the result
    encode_dense.encode(model_dir, shards_dir, tmp_path / "v", DOCS, "cls")
    whole, found = (DenseVectors.open(tmp_path / name).matrix for name in ("whole", "v"))
    np.testing.assert_array_equal(found[16:], whole[16:])
    np.testing.assert_allclose(found[:16], whole[:16] + 1)
    with monkeypatch.context() as patch, pytest.raises(Stopped):  # at the very end
        patch.setattr(artifact, "fsync", lambda path: (_ for _ in ()).throw(Stopped))
        encode_dense.encode(model_dir, shards_dir, tmp_path / "w", DOCS, "cls")
    with monkeypatch.context() as patch:
        patch.setattr(DenseEncoder, "forward", lambda *arguments, **more: 1 / 0)
        encode_dense.encode(model_dir, shards_dir, tmp_path / "w", DOCS, "cls")
    assert artifact.read(tmp_path / "w").files == artifact.read(tmp_path / "whole").files
    encode_dense.encode(model_dir, shards_dir, tmp_path / "q", EncodeConfig("queries", "dev"), "bottleneck")
    assert DenseVectors.open(tmp_path / "q", "queries").extra["split"] == "dev"


def test_refusals(model_dir, shards_dir, tmp_path):
    for config in (EncodeConfig("docs", top_k=3), EncodeConfig("docs", threshold=0.1)):
        with pytest.raises(InputError, match="top-k and threshold are for lexicon vectors"):
            encode_dense.encode(model_dir, shards_dir, tmp_path / "v", config, "cls")
    with pytest.raises(InputError, match="unknown representation 'max'"):
        encode_dense.encode(model_dir, shards_dir, tmp_path / "v", DOCS, "max")
    with pytest.raises(InputError, match="no queries of the split"):
        encode_dense.encode(model_dir, shards_dir, tmp_path / "w", EncodeConfig("queries", "none"), "cls")


def made(tmp_path, ids=("a", "b", "c"), **extra):
    matrix = np.arange(6, dtype=np.float32).reshape(3, 2)
    DenseVectors(list(ids), matrix, {"side": "docs", **extra}).save(tmp_path / "v")
    return tmp_path / "v"


def test_round_trip_and_subset(tmp_path):
    found = DenseVectors.open(made(tmp_path), side="docs")
    assert list(found.ids) == ["a", "b", "c"] and found.matrix.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert found.subset([2, 0]).matrix.tolist() == [[4, 5], [0, 1]] and found.subset([2, 0]).ids == ["c", "a"]
    with pytest.raises(InputError, match="vectors of docs, but vectors of queries"):
        DenseVectors.open(tmp_path / "v", side="queries")
    with pytest.raises(InputError, match="of kind 'dense', but 'vectors' is needed"):
        SparseVectors.open(tmp_path / "v")


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda v: (v / dense.MATRIX).write_bytes((v / dense.MATRIX).read_bytes()[:-5]), "is not as long as an array of"),
    (lambda v: (v / dense.MATRIX).write_bytes(b"nothing"), "not an array in C order"),
    (lambda v: (v / dense.MATRIX).unlink(), "is missing"),
    (lambda v: (v / dense.IDS).write_bytes(b"nothing"), "not a complete Arrow file"),
    (lambda v: (v / dense.IDS).unlink(), "is missing"),
    (lambda v: np.save(v / dense.MATRIX, np.zeros((3, 2))), "holds <f8 in 2 axes, <f4 in 2 is needed"),
    (lambda v: np.save(v / dense.MATRIX, np.zeros((2, 2), np.float32)), "2 rows for 3 ids"),
    (lambda v: np.save(v / dense.MATRIX, np.array([[1, 2], [3, np.nan], [1, 1]], np.float32)), "vector of 'b'"),
    (lambda v: dense.write_ids(v / dense.IDS, ["a", "a", "b"]), "more than once")])
def test_what_is_damaged_is_refused(tmp_path, damage, reason, monkeypatch):
    monkeypatch.setenv(verification.VARIABLE, "off")
    damage(made(tmp_path))
    with pytest.raises(InputError, match=reason) as error:
        DenseVectors.open(tmp_path / "v")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("world", [2, 4])  # of four ranks one has nothing to do
def test_ranks_as_threads_make_what_one_makes(model_dir, shards_dir, tmp_path, monkeypatch, world):
    encode_dense.encode(model_dir, shards_dir, tmp_path / "whole", DOCS, "bottleneck")
    local, barrier = threading.local(), threading.Barrier(world)

    @contextlib.contextmanager
    def ranks():
        yield local.rank, world, torch.device("cpu")

    monkeypatch.setattr(blocks, "ranks", ranks)
    monkeypatch.setattr(blocks, "is_main_rank", lambda: local.rank == 0)
    monkeypatch.setattr(blocks, "Hosts", thread_hosts(local, barrier))
    encoder = DenseEncoder.load(model_dir)  # transformers cannot load in several threads at once
    monkeypatch.setattr(DenseEncoder, "load", lambda *_, **__: encoder)

    def work(rank: int) -> None:
        local.rank = rank
        encode_dense.encode(model_dir, shards_dir, tmp_path / "v", DOCS, "bottleneck")

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(work, range(world)))
    one, several = DenseVectors.open(tmp_path / "whole"), DenseVectors.open(tmp_path / "v")
    assert several.ids == one.ids
    # A product of matrices may round otherwise in another thread.
    np.testing.assert_allclose(several.matrix, one.matrix, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- sentence encoders


def sentence_encoder(folder: Path, model_dir: Path, pooling: dict, normalize: bool) -> Path:
    """A folder as sentence-transformers writes it, around the weights and the tokenizer of a model of ours."""
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns(
        artifact.MANIFEST, "modules.json", "config_sentence_transformers.json", "*_*", "README.md"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model_dir / name).exists():
            shutil.copy(model_dir / name, folder / name)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [{"idx": i, "name": str(i), "path": "" if i == 0 else f"{i}_{kind}",
                "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **pooling}))
    if normalize:
        (folder / "2_Normalize").mkdir()
    return folder


MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


@pytest.mark.parametrize(("representation", "pooling", "normalize"), [
    ("mean", MEAN, True), ("mean", MEAN, False), ("cls", CLS, True), ("cls", CLS, False)])
def test_sentence_transformers_gives_the_same_vectors(model_dir, shards_dir, tiny_shards, beir_dir, tmp_path,
                                                      representation, pooling, normalize):
    peer = pytest.importorskip("sentence_transformers", reason="sentence-transformers is absent")
    folder = sentence_encoder(tmp_path / "model", model_dir, pooling, normalize)
    encode_dense.encode(folder, shards_dir, tmp_path / "v", EncodeConfig("queries", "dev"), representation)
    found = DenseVectors.open(tmp_path / "v", "queries")
    texts = {query["_id"]: query["text"] for query in map(json.loads, (beir_dir / "queries.jsonl").open())}
    other = peer.SentenceTransformer(str(folder), device="cpu")
    other.max_seq_length = tiny_shards.manifest.extra["query_length"]
    expected = other.encode([texts[name] for name in found.ids])
    np.testing.assert_allclose(found.matrix, expected, atol=1e-5)
    lengths = np.linalg.norm(found.matrix, axis=1)
    assert np.allclose(lengths, 1, atol=1e-5) == normalize


def test_a_sentence_encoder_is_pooled_in_its_own_way(model_dir, shards_dir, tmp_path):
    mean = sentence_encoder(tmp_path / "mean", model_dir, MEAN, True)
    for representation in ("cls", "bottleneck"):
        with pytest.raises(InputError, match=f"pools its tokens by mean, not by {representation}"):
            encode_dense.encode(mean, shards_dir, tmp_path / "v", DOCS, representation)
    newer = sentence_encoder(tmp_path / "newer", model_dir, {"pooling_mode": "cls"}, True)
    with pytest.raises(InputError, match="pools its tokens by cls, not by mean"):
        encode_dense.encode(newer, shards_dir, tmp_path / "v", DOCS, "mean")
    modules = json.loads((mean / "modules.json").read_text())
    (mean / "modules.json").write_text(json.dumps([*modules, {"idx": 3, "name": "3", "path": "3_Dense",
                                                              "type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(InputError, match="Transformer → Pooling → Normalize → Dense, which is not computed here"):
        encode_dense.encode(mean, shards_dir, tmp_path / "v", DOCS, "mean")
