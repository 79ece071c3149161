"""Sparse encoders of others: the vectors of sentence-transformers for folders that it wrote itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUERY_LENGTH, queries, write_model
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from lexmae import artifact
from lexmae.data.shards import prepare
from lexmae.errors import InputError
from lexmae.model import foreign
from lexmae.model.encoder import SparseEncoder
from lexmae.model.foreign import StaticEncoder
from lexmae.model.pooling import Pooling
from lexmae.retrieval import encode
from lexmae.retrieval.vectors import SparseVectors


class Package:
    """sentence-transformers, imported by the first test that needs it: that takes seconds."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str):
        return getattr(pytest.importorskip(self.name, reason="sentence-transformers is absent"), attribute)


peer, parts = Package("sentence_transformers"), Package("sentence_transformers.sparse_encoder.modules")
TEXTS = ["silver bridges", "quiet travellers remember winter markets under open skies", "fish ☃", "", "[SEP] fish fish"]


@pytest.fixture(scope="module")
def plain(shards_dir, tmp_path_factory) -> Path:
    """A masked language model and its tokenizer alone, as published SPLADE checkpoints were."""
    ours = write_model(tmp_path_factory.mktemp("plain") / "ours", shards_dir, seed=3)
    folder = ours.parent / "plain"
    shutil.copytree(ours, folder, ignore=shutil.ignore_patterns("*.py", "modules.json", "*_*", "manifest.json"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ours / name, folder)
    return folder


def transformer(plain: Path):
    return parts.Transformer(str(plain), transformer_task="fill-mask")


def saved(folder: Path, *modules, **settings) -> Path:
    """A folder as sentence-transformers writes it."""
    peer.SparseEncoder(modules=list(modules), device="cpu", **settings).save_pretrained(str(folder))
    return folder


def inputs(folder: Path, texts: list[str], **settings) -> dict[str, torch.Tensor]:
    """What `SparseEncoder` takes, from the folder's own tokenizer: text tokens are those that it did not add."""
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt",
                                                   return_special_tokens_mask=True, **settings)
    attention = tokens["attention_mask"]
    return {"input_ids": tokens["input_ids"], "attention_mask": attention, "token_type_ids": tokens["token_type_ids"],
            "text_mask": attention.bool() & ~tokens["special_tokens_mask"].bool()}


def assert_same(folder: Path, tokenizer: Path, texts: list[str] = TEXTS) -> None:
    """Both sides give the vectors of the folder's own package."""
    model = peer.SparseEncoder(str(folder), device="cpu")
    for side, theirs in (("docs", model.encode_document), ("queries", model.encode_query)):
        with torch.inference_mode():
            got = SparseEncoder.load(folder, side=side).eval()(**inputs(tokenizer, texts))
        expected = theirs(texts, convert_to_sparse_tensor=False)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert 0 < (got[1] > 0).sum() < got.shape[1]


# ----------------------------------------------------------------------------------------------------- the rules


def test_a_plain_checkpoint_pools_all_tokens(plain):
    encoder, texts = SparseEncoder.load(plain).eval(), TEXTS[:2]
    lm = AutoModelForMaskedLM.from_pretrained(plain).eval()
    for row, text in enumerate(texts):
        with torch.no_grad():
            logits = lm(**AutoTokenizer.from_pretrained(plain)(text, return_tensors="pt")).logits[0]
            got = encoder(**inputs(plain, texts))[row]
        torch.testing.assert_close(got, torch.log(1 + torch.relu(logits)).amax(0), atol=1e-5, rtol=1e-5)
        assert (got - torch.log(1 + torch.relu(logits[1:-1])).amax(0)).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_pooling_strategies_and_activations(plain, tmp_path, strategy, activation):
    assert_same(saved(tmp_path / "m", transformer(plain), parts.SpladePooling(strategy, activation)), plain)


@pytest.mark.slow
def test_sums_come_in_tiles_of_the_vocabulary(plain, tmp_path, monkeypatch):
    folder = saved(tmp_path / "m", transformer(plain), parts.SpladePooling("sum"))
    whole = SparseEncoder.load(folder).eval()(**inputs(plain, TEXTS)).detach()
    monkeypatch.setattr("lexmae.model.pooling._TILE", 7 * inputs(plain, TEXTS)["input_ids"].numel())
    torch.testing.assert_close(SparseEncoder.load(folder).eval()(**inputs(plain, TEXTS)), whole)


@pytest.mark.slow
def test_the_older_module_and_a_limit_of_terms(plain, tmp_path):
    folder = saved(tmp_path / "m", parts.MLMTransformer(str(plain)), parts.SpladePooling("max"), max_active_dims=4)
    assert_same(folder, plain)
    assert (SparseEncoder.load(folder).eval()(**inputs(plain, TEXTS)) > 0).sum(1).tolist() == [4] * 5


@pytest.mark.slow
def test_a_mask_of_one_side_only(plain, tmp_path):
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    mask = MultiVectorMask(["[CLS]", "fish", "no-such-token"], skiplist_tasks="document")
    folder = saved(tmp_path / "m", transformer(plain), mask, parts.SpladePooling())
    assert_same(folder, plain)
    one, other = (SparseEncoder.load(folder, side=side).eval()(**inputs(plain, TEXTS)) for side in foreign.SIDES)
    assert (one - other).abs().max() > 0.01


@pytest.mark.slow
def test_a_folder_of_ours_keeps_our_rule(model_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy, ignore=shutil.ignore_patterns(artifact.MANIFEST))
    expected = SparseEncoder.load(model_dir).eval()(**inputs(model_dir, TEXTS[:3]))
    assert foreign.plan(model_dir, "docs").pooling == Pooling()
    torch.testing.assert_close(SparseEncoder.load(copy).eval()(**inputs(copy, TEXTS[:3])), expected)
    assert_same(copy, copy, TEXTS[:4])


# ------------------------------------------------------------------------------------------- queries without model


def router(plain: Path, query: list, **settings):
    document = [transformer(plain), parts.SpladePooling("max", "log1p_relu")]
    return parts.Router.for_query_document(query_modules=query, document_modules=document, **settings)


@pytest.mark.slow
def test_inference_free_queries(plain, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(plain)
    weights = torch.rand(len(tokenizer), generator=torch.Generator().manual_seed(5)) + 0.1
    folder = saved(tmp_path / "m", router(plain, [parts.SparseStaticEmbedding(tokenizer, weights, frozen=True)]))
    assert isinstance(SparseEncoder.load(folder, side="queries"), StaticEncoder)
    texts = TEXTS[:4]  # the package takes a special token that is spelled out for one; shards never do
    assert_same(folder, plain, texts)


@pytest.mark.slow
def test_two_models_behind_a_router(plain, tmp_path):
    query = [transformer(plain), parts.SpladePooling("sum")]
    assert_same(saved(tmp_path / "m", router(plain, query)), plain)


@pytest.mark.slow
def test_a_module_behind_the_router(plain, tmp_path):
    ways = parts.Router.for_query_document([transformer(plain)], [transformer(plain)])
    assert_same(saved(tmp_path / "m", ways, parts.SpladePooling("max")), plain)


@pytest.mark.slow
def test_routes_are_chosen_in_the_packages_order(plain, tmp_path):
    ways = parts.Router({"a": [transformer(plain), parts.SpladePooling("max")],
                         "b": [transformer(plain), parts.SpladePooling("sum")]},
                        route_mappings={("query", "text"): "b", (None, None): "a"})
    assert_same(saved(tmp_path / "m", ways), plain)
    other = parts.Router({"a": [transformer(plain), parts.SpladePooling("max")],
                          "query": [transformer(plain), parts.SpladePooling("sum")]},
                         route_mappings={("document", None): "a"})
    assert_same(saved(tmp_path / "n", other), plain)


@pytest.mark.slow
def test_a_table_of_tokens_beside_a_plain_model(plain, tmp_path):
    """OpenSearch's doc-only models: idf.json, read by the package's own reader and by ours."""
    folder = tmp_path / "opensearch"
    shutil.copytree(plain, folder)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    table = {token: 0.5 + index / 10 for token, index in tokenizer.get_vocab().items() if index % 3}
    (folder / "idf.json").write_text(json.dumps(table), encoding="utf-8")
    static = parts.SparseStaticEmbedding.from_json(str(folder / "idf.json"), tokenizer)
    texts = TEXTS[:4]
    expected = static(static.preprocess(texts))["sentence_embedding"]
    got = SparseEncoder.load(folder, side="queries")(**inputs(plain, texts))
    torch.testing.assert_close(got, expected.detach())
    torch.testing.assert_close(SparseEncoder.load(folder).eval()(**inputs(plain, texts)),
                               SparseEncoder.load(plain).eval()(**inputs(plain, texts)))


def test_a_table_in_a_folder_of_ours(model_dir, tmp_path):
    """By hand: the weight of each token that is text, once; as a finished model, and routed in a copy of it."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    weights = torch.rand(len(AutoTokenizer.from_pretrained(folder)))
    save_file({"weight": weights}, folder / "query_weights.safetensors")
    text = inputs(folder, ["fish river fish"])
    expected = torch.zeros(1, len(weights))
    for token in text["input_ids"][0][1:-1].tolist():
        expected[0, token] = weights[token]
    torch.testing.assert_close(SparseEncoder.load(folder, side="queries")(**text), expected)
    docs = SparseEncoder.load(folder).eval()(**text)
    (folder / artifact.MANIFEST).unlink()
    modules = {module["path"] or ".": module["type"] for module in json.loads((folder / "modules.json").read_text())}
    (folder / "query_0").mkdir()
    save_file({"weight": weights}, folder / "query_0" / "model.safetensors")
    edit(folder, "router_config.json", types={"query_0": "x.SparseStaticEmbedding", **modules}, parameters={},
         structure={"query": ["query_0"], "document": list(modules)})
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "path": "", "type": "x.Router"}]))
    torch.testing.assert_close(SparseEncoder.load(folder, side="queries")(**text), expected)
    torch.testing.assert_close(SparseEncoder.load(folder).eval()(**text), docs)


# ------------------------------------------------------------------------------------------------------ encoding


@pytest.mark.slow
def test_encoded_queries_are_the_packages(plain, tmp_path, beir_dir, shards_dir):
    tokenizer = AutoTokenizer.from_pretrained(plain)
    weights = torch.rand(len(tokenizer), generator=torch.Generator().manual_seed(6)) + 0.1
    folder = saved(tmp_path / "m", router(plain, [parts.SparseStaticEmbedding(tokenizer, weights)]))
    encode.encode(folder, shards_dir, tmp_path / "q", encode.EncodeConfig("queries", "dev"))
    encode.encode(folder, shards_dir, tmp_path / "d", encode.EncodeConfig("docs"))
    found, texts = SparseVectors.open(tmp_path / "q"), {query.id: query.text for query in queries()}
    model = peer.SparseEncoder(str(folder), device="cpu")
    model[0].sub_modules["query"][0].tokenizer.model_max_length = QUERY_LENGTH - 2
    expected = model.encode_query([texts[name] for name in found.ids], convert_to_sparse_tensor=False)
    rounded = np.rint(expected.numpy() * np.float32(100))
    assert (found.to_scipy().toarray() == rounded).all()
    assert len(SparseVectors.open(tmp_path / "d")) == 41


def test_another_vocabulary_is_refused(plain, shards_dir, tmp_path, beir_dir):
    prepare(beir_dir, tmp_path / "shards", train_tokenizer=120, max_length=28, query_length=10, workers=1)
    with pytest.raises(InputError, match="has 140 tokens, .* has 120; prepare shards with --tokenizer"):
        encode.encode(plain, tmp_path / "shards", tmp_path / "v", encode.EncodeConfig("docs"))
    other = tmp_path / "other"
    shutil.copytree(plain, other)
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    entries = content["model"]["vocab"]
    names = {index: entry for entry, index in entries.items()}
    entries[names[77]], entries[names[78]] = 78, 77
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=r"another tokenizer than .*: entry 77 is .* there \(2 differ\); prepare"):
        encode.encode(other, shards_dir, tmp_path / "v", encode.EncodeConfig("docs"))
    assert not list(tmp_path.glob("v*"))


def test_other_settings_of_a_tokenizer_are_a_warning(plain, shards_dir, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(plain, other)
    edit(other, "tokenizer_config.json", do_lower_case=False)
    encode.encode(other, shards_dir, tmp_path / "v", encode.EncodeConfig("queries", "dev"))
    assert "but other settings" in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    encode.encode(other, shards_dir, tmp_path / "w", encode.EncodeConfig("queries", "dev"))
    assert "has no tokenizer" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ refusals


def edit(folder: Path, name: str, **values) -> None:
    file = folder / name
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.fixture
def splade(plain, tmp_path) -> Path:
    """A folder as sentence-transformers writes it, written by hand."""
    folder = tmp_path / "splade"
    shutil.copytree(plain, folder)
    kinds = {"": "base.modules.transformer.Transformer", "1_SpladePooling": "sparse_encoder.modules.SpladePooling"}
    (folder / "modules.json").write_text(json.dumps(
        [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
         for i, (path, kind) in enumerate(kinds.items())]))
    (folder / "1_SpladePooling").mkdir()
    edit(folder, "1_SpladePooling/config.json", pooling_strategy="max", activation_function="relu")
    edit(folder, "sentence_bert_config.json", transformer_task="fill-mask")
    edit(folder, "config_sentence_transformers.json", prompts={"query": "", "document": ""}, default_prompt_name=None)
    return folder


@pytest.mark.parametrize("name, values, side, reason", [
    ("sentence_bert_config.json", {"transformer_task": "feature-extraction"}, "docs", "made for feature-extraction"),
    ("sentence_bert_config.json", {"do_lower_case": True}, "docs", "lower-cases texts outside of its tokenizer"),
    ("sentence_bert_config.json", {"query_expansion": {"length": 32}}, "queries", "expands its queries"),
    ("config_sentence_transformers.json", {"prompts": {"query": "query: "}}, "queries", "the prompt 'query: ' before"),
    ("config_sentence_transformers.json", {"prompts": {"a": "x"}, "default_prompt_name": "a"}, "docs", "prompt 'x'"),
    ("config_sentence_transformers.json", {"prompts": ["x"]}, "docs", "prompts: an object is needed"),
    ("config_sentence_transformers.json", {"max_active_dims": "x"}, "docs", "max_active_dims: a number of entries"),
    ("1_SpladePooling/config.json", {"pooling_strategy": "mean"}, "docs", "unknown pooling 'mean'; known are max, sum"),
    ("1_SpladePooling/config.json", {"activation_function": "gelu"}, "docs", "unknown pooling 'gelu'"),
])
def test_what_cannot_be_computed_is_refused(splade, name, values, side, reason):
    edit(splade, name, **values)
    with pytest.raises(InputError, match=reason):
        SparseEncoder.load(splade, side=side)


def test_a_prompt_of_the_other_side_does_not_matter(splade):
    edit(splade, "config_sentence_transformers.json", prompts={"query": "query: ", "document": ""})
    assert foreign.plan(splade, "docs").pooling == Pooling(skipped=())


def test_unknown_modules_and_broken_files_are_refused(splade, plain):
    modules = json.loads((splade / "modules.json").read_text(encoding="utf-8"))
    (splade / "modules.json").write_text(json.dumps([*modules, {"idx": 2, "path": "", "type": "x.Dense"}]))
    with pytest.raises(InputError, match="docs go through Transformer → SpladePooling → Dense, which is not computed"):
        SparseEncoder.load(splade)
    (splade / "modules.json").write_text(json.dumps([{"idx": 0}]))
    with pytest.raises(InputError, match="not a list of sentence-transformers' modules"):
        SparseEncoder.load(splade)
    (splade / "modules.json").write_text(json.dumps(modules))
    kept = (splade / "config_sentence_transformers.json").read_text(encoding="utf-8")
    (splade / "config_sentence_transformers.json").write_text("[1]")
    with pytest.raises(InputError, match="config_sentence_transformers.json: a JSON object is needed"):
        SparseEncoder.load(splade)
    (splade / "config_sentence_transformers.json").write_text(kept)
    (splade / "modules.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        SparseEncoder.load(splade)
    with pytest.raises(InputError, match="unknown side 'both'"):
        SparseEncoder.load(plain, side="both")


@pytest.mark.parametrize("table, reason", [({"fish": -1.0}, "negative"), ({"fish": "much"}, "no table of tokens"),
                                           ([1.0], "no table of tokens")])
def test_bad_tables_are_refused(plain, tmp_path, table, reason):
    folder = tmp_path / "m"
    shutil.copytree(plain, folder)
    (folder / "idf.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match=reason):
        SparseEncoder.load(folder, side="queries")


@pytest.mark.slow
def test_a_router_without_weights_or_ways(plain, tmp_path):
    static = parts.SparseStaticEmbedding(AutoTokenizer.from_pretrained(plain))
    folder = saved(tmp_path / "m", router(plain, [static]))
    for file in folder.rglob("query_*/model.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="has no weights of its query tokens"):
        SparseEncoder.load(folder, side="queries")
    edit(folder, "router_config.json", structure={"query": ["x"]})
    with pytest.raises(InputError, match="its router has no way for the task 'document'; it has query"):
        SparseEncoder.load(folder)
    edit(folder, "router_config.json", structure={})
    with pytest.raises(InputError, match="its router has no router_config.json"):
        SparseEncoder.load(folder)
