from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import SIZES, SPECIAL, STRUCTURAL, VOCAB, batch, tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.encoder import SparseEncoder, save_masked_lm, structural_tokens

ALL = sorted(SIZES)
WORDS = "the cat sat on mat dog ran fast over a lazy fox quick brown jumps".split()


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A tiny lower-casing WordPiece tokenizer; ids of the special tokens as in SPECIAL, the rest unused words."""
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    entries += [f"[unused{i}]" for i in range(VOCAB - len(entries))]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", SPECIAL["cls"]), ("[SEP]", SPECIAL["sep"])],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        mask_token="[MASK]", model_max_length=20,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


def by_hand(lm, inputs: dict) -> torch.Tensor:
    """SPEC §2 with the model's own logits, one sequence at a time and without padding."""
    rows = []
    for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        kept = {"input_ids": inputs["input_ids"][i : i + 1, :length]}
        if lm.config.model_type == "bert":
            kept["token_type_ids"] = inputs["token_type_ids"][i : i + 1, :length]
        logits = lm(**kept).logits[0]
        text = [t for t in range(length) if inputs["input_ids"][i, t].item() not in STRUCTURAL]
        rows.append(torch.log(1 + torch.relu(logits[text])).amax(0))
    return torch.stack(rows)


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("head", ["reference", "chunked"])
def test_vectors_are_the_saturated_maxima(architecture, head):
    lm, inputs = tiny(architecture), batch()
    got = SparseEncoder(lm, head).eval()(**inputs)
    assert got.shape == (3, VOCAB) and got.dtype == torch.float32
    torch.testing.assert_close(got, by_hand(lm, inputs), atol=1e-5, rtol=1e-4)
    assert 0.1 < (got > 0).float().mean() < 1


def test_special_tokens_matter_to_the_test():
    """Otherwise the comparison above could not see them leaking in."""
    lm, inputs = tiny("bert"), batch()
    encoder = SparseEncoder(lm).eval()
    leaking = encoder(**{**inputs, "text_mask": inputs["attention_mask"].bool()})
    assert (leaking - encoder(**inputs)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ALL)
def test_every_parameter_gets_a_gradient(architecture):
    encoder = SparseEncoder(tiny(architecture))
    encoder(**batch()).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_a_text_without_tokens_is_a_zero_vector():
    inputs = batch()
    inputs["text_mask"][1] = False
    vectors = SparseEncoder(tiny("bert")).eval()(**inputs)
    assert vectors[1].eq(0).all() and vectors[0].gt(0).any() and vectors.isfinite().all()


def test_autocast_vectors_are_float32_and_near():
    encoder, inputs = SparseEncoder(tiny("bert")).eval(), batch()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = encoder(**inputs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, encoder(**inputs).detach(), atol=0.1, rtol=0.05)


# --------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("architecture", ALL)
def test_round_trip(architecture, tmp_path, tokenizer_dir):
    encoder, inputs = SparseEncoder(tiny(architecture)).eval(), batch()
    encoder.save(tmp_path / "model", tokenizer_dir)
    loaded = SparseEncoder.load(tmp_path / "model").eval()
    torch.testing.assert_close(loaded(**inputs), encoder(**inputs), rtol=0, atol=0)
    torch.testing.assert_close(
        by_hand(AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval(), inputs), by_hand(encoder.lm, inputs)
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("The cat zzz")["input_ids"] == [2, 5, 6, 1, 3]


def test_tied_weights_are_stored_once(tmp_path):
    SparseEncoder(tiny("bert")).save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert [name for name, value in stored.items() if value.shape == (VOCAB, 16)] == [
        "bert.embeddings.word_embeddings.weight"
    ]
    assert not (tmp_path / "modules.json").exists()


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("tied", ["shared", "copied", "left out"])
def test_gathered_weights_replace_the_models_own(architecture, tied, tmp_path, tokenizer_dir):
    """As under ZeRO-3: the model's own parameters are empty, and what was gathered may or may not share memory."""
    lm, other = tiny(architecture, seed=1), tiny(architecture, seed=2)
    state = other.state_dict()
    if tied == "copied":
        state = {name: value.clone() for name, value in state.items()}
    elif tied == "left out":
        state = {name: value.detach().clone() for name, value in other.named_parameters()}
    for parameter in lm.parameters():
        parameter.data = torch.empty(0)
    names = list(state)
    save_masked_lm(lm, tmp_path, tokenizer_dir, state)
    assert list(state) == names
    loaded, inputs = SparseEncoder.load(tmp_path).eval(), batch()
    torch.testing.assert_close(loaded(**inputs), SparseEncoder(other).eval()(**inputs), rtol=0, atol=0)
    assert backbone.output_matrix(loaded.lm)[0] is backbone.word_embeddings(loaded.lm)


def test_config_names_the_type_of_the_gathered_weights(tmp_path):
    state = {name: value.clone() for name, value in tiny("bert").state_dict().items()}
    save_masked_lm(tiny("bert").bfloat16(), tmp_path, state_dict=state)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).dtype == torch.float32


def test_sentence_transformers_files(tmp_path, tokenizer_dir):
    SparseEncoder(tiny("bert")).save(tmp_path, tokenizer_dir)
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [m["type"].rsplit(".", 1)[1] for m in modules] == ["Transformer", "MultiVectorMask", "SpladePooling"]
    mask = json.loads((tmp_path / modules[1]["path"] / "config.json").read_text())
    assert mask["skiplist_words"] == ["[CLS]", "[MASK]", "[PAD]", "[SEP]"]
    assert mask["skiplist_tasks"] == ["query", "document"]
    pooling = json.loads((tmp_path / modules[2]["path"] / "config.json").read_text())
    assert pooling == {"pooling_strategy": "max", "activation_function": "relu", "embedding_dimension": VOCAB}
    assert json.loads((tmp_path / "config_sentence_transformers.json").read_text())["model_type"] == "SparseEncoder"


def test_the_unknown_token_is_text(tokenizer_dir):
    assert structural_tokens(AutoTokenizer.from_pretrained(tokenizer_dir)) == ["[CLS]", "[MASK]", "[PAD]", "[SEP]"]


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match="tokenizer"):
        SparseEncoder(tiny("bert")).save(tmp_path / "model", tmp_path / "nowhere")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        SparseEncoder.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ALL)
def test_sentence_transformers_gives_the_same_vectors(architecture, tmp_path, tokenizer_dir):
    peer = pytest.importorskip("sentence_transformers", minversion="6.2", reason="sentence-transformers 6.2 is absent")
    encoder = SparseEncoder(tiny(architecture)).eval()
    encoder.save(tmp_path, tokenizer_dir)
    texts = ["the cat sat", "A quick brown fox zzz jumps over the lazy dog", "", "mat"]
    tokens = AutoTokenizer.from_pretrained(tokenizer_dir)(texts, padding=True, return_tensors="pt")
    ids, attention = tokens["input_ids"], tokens["attention_mask"]
    text = ~torch.isin(ids, torch.tensor(STRUCTURAL))
    with torch.no_grad():
        expected = encoder(ids, attention, text, torch.zeros_like(ids))
    leaked = encoder(ids, attention, attention.bool(), torch.zeros_like(ids))
    assert (leaked - expected).abs().max() > 0.1 and not expected[2].any()
    model = peer.SparseEncoder(str(tmp_path), device="cpu")
    for encode in (model.encode, model.encode_query, model.encode_document):
        got = encode(texts, convert_to_sparse_tensor=False)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    scores = model.similarity(model.encode(texts), model.encode(texts))
    torch.testing.assert_close(scores, expected @ expected.T, atol=1e-3, rtol=1e-4)
