"""Queries from a table: vectors and gradients by hand, folders, sentence-transformers, encoding without a model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import QUERY_LENGTH
from launching import reseal
from safetensors.torch import load_file

from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.model import backbone, static_queries
from lexmae.model.encoder import SparseEncoder
from lexmae.model.static_queries import StaticQueries
from lexmae.retrieval import encode
from lexmae.retrieval.encode import EncodeConfig
from lexmae.retrieval.vectors import SparseVectors

WEIGHTS = torch.tensor([0.5, 2.0, 0.25, 4.0, 1.0, 12.0])
IDS = torch.tensor([[0, 3, 5, 3, 1], [0, 4, 1, 2, 2]])
TEXT = torch.tensor([[False, True, True, True, False], [False, True, False, False, False]])


def test_vectors_by_hand():
    table = StaticQueries(WEIGHTS)
    expected = torch.tensor([[0, 0, 0, 4.0, 0, 12.0], [0, 0, 0, 0, 1.0, 0]])  # token 3 counts once
    torch.testing.assert_close(table(IDS, TEXT), expected)
    torch.testing.assert_close(table(input_ids=IDS, attention_mask=IDS, text_mask=TEXT, token_type_ids=IDS), expected)
    assert not table(IDS, torch.zeros_like(TEXT)).any()


def test_gradients_by_hand():
    """Of softplus the logistic function, here 1 - exp(-weight); tokens of no query get none."""
    table = StaticQueries(WEIGHTS)
    vectors = table(IDS, TEXT)
    (vectors * torch.arange(12.0).view(2, 6)).sum().backward()
    factors = torch.tensor([0, 0, 0, 3.0, 10.0, 5.0])
    torch.testing.assert_close(table.raw.grad, factors * (1 - torch.exp(-WEIGHTS)))


def test_gradients_against_differences():
    table = StaticQueries(WEIGHTS)
    found = table(IDS, TEXT).square().sum()
    found.backward()
    for token in (3, 4):
        moved = StaticQueries(WEIGHTS)
        with torch.no_grad():
            moved.raw[token] += 1e-2
            rise = moved(IDS, TEXT).square().sum() - found
        assert rise.item() / 1e-2 == pytest.approx(table.raw.grad[token].item(), rel=0.02)


@pytest.mark.parametrize("weight", [0.0, 1e-6, 0.01, 1.0, 30.0])
def test_a_weight_survives_its_parameter(weight):
    table = StaticQueries(torch.full((3,), weight))
    found = table(torch.tensor([[1]]), torch.tensor([[True]]))[0, 1]
    assert found.item() == pytest.approx(max(weight, 1e-6), rel=1e-3)


def test_it_starts_as_bm25s_inverse_document_frequency(tiny_shards):
    frequency = torch.from_numpy(tiny_shards.docs.document_frequency(tiny_shards.vocab_size))
    found = static_queries.inverse_document_frequency(frequency, len(tiny_shards.docs), tiny_shards.vocab_size + 2)
    holds = np.zeros(tiny_shards.vocab_size, int)
    for row in range(len(tiny_shards.docs)):
        holds[np.unique(tiny_shards.docs.tokens(row))] += 1
    expected = [max(0.01, math.log(1 + (41 - df + 0.5) / (df + 0.5))) for df in [*holds, 0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.min() > 0


# --------------------------------------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def static_dir(model_dir, shards_dir, tiny_shards, tmp_path_factory) -> Path:
    """The model of `model_dir` with a table of random weights."""
    folder = tmp_path_factory.mktemp("static") / "model"
    shutil.copytree(model_dir, folder)
    torch.manual_seed(3)
    raw = torch.randn(tiny_shards.vocab_size)
    assert static_queries.save_table(folder, raw, tiny_shards.tokenizer_dir, QUERY_LENGTH)
    reseal(folder)
    return folder


def queries_by_hand(folder: Path, shards: Shards, split: str) -> torch.Tensor:
    """Vectors [queries, V], token by token."""
    weights, table = load_file(folder / static_queries.TABLE)["weight"], shards.queries(split)
    found = torch.zeros(len(table), shards.vocab_size)
    for row in range(len(table)):
        for token in table.tokens(row).tolist():
            if token not in shards.special.structural:
                found[row, token] = weights[token]
    return found


def test_round_trip(static_dir, tiny_shards):
    torch.manual_seed(3)
    expected = torch.nn.functional.softplus(torch.randn(tiny_shards.vocab_size))
    expected[list(tiny_shards.special.structural)] = 0
    torch.testing.assert_close(static_queries.read_table(static_dir), expected)
    loaded = torch.nn.functional.softplus(StaticQueries(static_queries.read_table(static_dir)).raw.detach())
    torch.testing.assert_close(loaded, expected.clamp_min(1e-6), rtol=1e-4, atol=1e-7)
    assert static_queries.holds_table(static_dir)
    SparseEncoder.load(static_dir)  # the documents' encoder is where it was


def test_a_folder_without_a_table_or_with_a_damaged_one(model_dir, tmp_path):
    assert not static_queries.holds_table(model_dir)
    with pytest.raises(InputError, match="no such table"):
        static_queries.read_table(model_dir)
    (tmp_path / static_queries.TABLE).write_bytes(b"not a table")
    with pytest.raises(InputError, match="not a table of query weights"):
        static_queries.read_table(tmp_path)


def test_a_vocabulary_larger_than_the_tokenizers_has_no_files_of_the_peer(model_dir, tiny_shards, tmp_path):
    shutil.copytree(model_dir, tmp_path / "model")
    raw = torch.randn(tiny_shards.vocab_size + 3)
    assert not static_queries.save_table(tmp_path / "model", raw, tiny_shards.tokenizer_dir, QUERY_LENGTH)
    assert not (tmp_path / "model" / "modules.json").exists()
    assert len(static_queries.read_table(tmp_path / "model")) == len(raw)


def test_queries_are_encoded_without_the_transformer(static_dir, shards_dir, tiny_shards, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the transformer was loaded")

    monkeypatch.setattr(backbone, "load_masked_lm", refuse)
    encode.encode(static_dir, shards_dir, tmp_path / "v", EncodeConfig("queries", "train", batch_tokens=30))
    found = SparseVectors.open(tmp_path / "v", side="queries")
    by_hand = queries_by_hand(static_dir, tiny_shards, "train")
    for (_, terms, weights), row in zip(found.rows(), by_hand, strict=True):
        rounded = {t: round(float(np.float32(w) * np.float32(100))) for t, w in enumerate(row)}
        kept = {t: w for t, w in rounded.items() if w} or {tiny_shards.special.unk: 1}
        assert dict(zip(terms.tolist(), weights.tolist(), strict=True)) == kept
    with pytest.raises(AssertionError, match="was loaded"):
        encode.encode(static_dir, shards_dir, tmp_path / "d", EncodeConfig("docs"))


def test_documents_are_encoded_as_ever(static_dir, model_dir, shards_dir, tmp_path):
    for name, folder in (("static", static_dir), ("shared", model_dir)):
        encode.encode(folder, shards_dir, tmp_path / name, EncodeConfig("docs"))
    one, other = (SparseVectors.open(tmp_path / name) for name in ("static", "shared"))
    assert np.array_equal(one.indices, other.indices) and np.array_equal(one.weights, other.weights)


def test_the_peers_files(static_dir, tiny_shards):
    modules = json.loads((static_dir / "modules.json").read_text())
    assert [m["type"].rsplit(".", 1)[1] for m in modules] == ["Router"]
    router = json.loads((static_dir / "router_config.json").read_text())
    assert len(router["structure"]["query"]) == 1 and len(router["structure"]["document"]) == 3
    weights = load_file(static_dir / router["structure"]["query"][0] / "model.safetensors")["weight"]
    assert torch.equal(weights, static_queries.read_table(static_dir))


@pytest.mark.slow
def test_sentence_transformers_gives_the_same_vectors(static_dir, model_dir, tiny_shards):
    peer = pytest.importorskip("sentence_transformers", minversion="6.2", reason="sentence-transformers 6.2 is absent")
    model = peer.SparseEncoder(str(static_dir), device="cpu")
    texts = ["silver bridges silver", "☃ river", "", "fish " * 30 + "gates"]  # the last is cut
    tokenizer = model[0].tokenizer
    weights = static_queries.read_table(static_dir)
    got = model.encode_query(texts, convert_to_sparse_tensor=False)
    for text, row in zip(texts, got, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:QUERY_LENGTH - 2]
        expected = torch.zeros(tiny_shards.vocab_size)
        expected[ids] = weights[ids]
        torch.testing.assert_close(row, expected)
    train = [query for query in conftest.queries() if query.id.startswith("t")]
    torch.testing.assert_close(
        model.encode_query([query.text for query in train], convert_to_sparse_tensor=False),
        queries_by_hand(static_dir, tiny_shards, "train"))
    plain = peer.SparseEncoder(str(model_dir), device="cpu")
    documents = model.encode_document(texts, convert_to_sparse_tensor=False)
    torch.testing.assert_close(documents, plain.encode_document(texts, convert_to_sparse_tensor=False))
    scores = model.similarity(model.encode_query(texts), model.encode_document(texts))
    torch.testing.assert_close(scores, got @ documents.T, atol=1e-3, rtol=1e-4)
