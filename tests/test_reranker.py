"""The cross-encoder: every backbone, the same scores in other libraries, what it starts from and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import passages, queries
from tiny_models import SIZES, SPECIAL, VOCAB, batch, tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lexmae.data.pairs import read_pairs
from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.encoder import SparseEncoder
from lexmae.model.reranker import CrossEncoder

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def pairs() -> dict[str, torch.Tensor]:
    found = batch()
    return {name: found[name] for name in INPUTS}


def scorer(architecture: str = "bert", seed: int = 0, scale: float = 0.3, vocab: int = VOCAB, special=SPECIAL, **size):
    """A random scorer whose scores lie apart."""
    torch.manual_seed(seed)
    model = backbone.create_scorer(architecture, vocab, special, {**SIZES[architecture], **size})
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=scale)
    return model.eval()


@pytest.mark.parametrize("architecture", backbone.FAMILIES)
def test_one_score_per_pair_and_the_same_in_transformers(architecture, tmp_path):
    model = CrossEncoder(scorer(architecture))
    with torch.no_grad():
        found = model(**pairs())
    assert found.shape == (3,) and found.dtype == torch.float32 and found.unique().numel() == 3
    model.save(tmp_path)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    given = {name: value for name, value in pairs().items() if name != "token_type_ids" or "bert" == architecture}
    with torch.no_grad():
        torch.testing.assert_close(other(**given).logits[:, 0], found)
        torch.testing.assert_close(CrossEncoder.load(tmp_path).eval()(**pairs()), found)
    assert (tmp_path / "model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model.scorer).__name__]


@pytest.mark.parametrize("architecture", backbone.FAMILIES)
def test_padding_does_not_change_a_score(architecture):
    model = CrossEncoder(scorer(architecture))
    together = pairs()
    with torch.no_grad():
        found = model(**together)
        for row in range(3):
            length = int(together["attention_mask"][row].sum())
            alone = model(**{name: value[row:row + 1, :length] for name, value in together.items()})
            torch.testing.assert_close(alone[0], found[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", backbone.FAMILIES)
def test_scores_in_low_precision_keep_their_digits(architecture):
    """Documents of similar relevance differ in digits that bf16 does not have."""
    model = CrossEncoder(scorer(architecture))
    with torch.no_grad():
        exact = model(**pairs())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(**pairs())
        assert (found != found.bfloat16().float()).any() and found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0.1, atol=0.2)
        assert model.to(torch.bfloat16)(**pairs()).dtype == torch.float32


def test_segments_count_where_the_backbone_has_them():
    model, given = CrossEncoder(scorer()), pairs()
    plain = given | {"token_type_ids": torch.zeros_like(given["token_type_ids"])}
    with torch.no_grad():
        assert not torch.allclose(model(**given), model(**plain))
        roberta = CrossEncoder(scorer("roberta"))
        assert torch.equal(roberta(**given), roberta(**plain))


@pytest.mark.parametrize("architecture", backbone.FAMILIES)
def test_a_masked_language_model_gives_its_encoder(architecture, tmp_path):
    lm = tiny(architecture)
    lm.save_pretrained(tmp_path)
    torch.manual_seed(5)
    model, new = backbone.load_scorer(str(tmp_path))
    assert new and all("classifier" in name or ".pooler." in name for name in new)
    with torch.no_grad():
        given = pairs()
        expected = backbone.hidden_states(lm, **given)
        torch.testing.assert_close(backbone.hidden_states(model.eval(), **given), expected)
    torch.manual_seed(5)
    again, _ = backbone.load_scorer(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(InputError, match="is no finished cross-encoder: it has no "):
        CrossEncoder.load(tmp_path)


def test_a_model_of_ours_is_taken_from_its_folder(model_dir):
    lm = SparseEncoder.load(model_dir).lm
    model, _ = backbone.load_scorer(str(model_dir))
    assert torch.equal(backbone.word_embeddings(model), backbone.word_embeddings(lm))


def test_what_is_no_model_of_one_score_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        backbone.load_scorer(str(tmp_path / "absent"))
    with pytest.raises(InputError, match="no config.json"):
        backbone.load_scorer(str(tmp_path))
    three = AutoModelForSequenceClassification.from_config(scorer().config, dtype=torch.float32)
    three.config.num_labels = 3
    three = type(three)(three.config)
    three.save_pretrained(tmp_path / "three")
    with pytest.raises(InputError, match="cannot load a model of one score"):
        backbone.load_scorer(str(tmp_path / "three"))
    with pytest.raises(InputError, match="unknown size width"):
        backbone.create_scorer("bert", VOCAB, SPECIAL, {"width": 3})
    lm = tiny()
    state = {name: value for name, value in lm.state_dict().items() if "layer.1." not in name}
    lm.save_pretrained(tmp_path / "half", state_dict=state)
    with pytest.raises(InputError, match="lacks weights of the encoder, such as bert.encoder.layer.1"):
        backbone.load_scorer(str(tmp_path / "half"))


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert"])
def test_sentence_transformers_gives_the_same_scores(architecture, tiny_shards, tmp_path):
    """Also where pairs are cut: the tokenizer in the folder cuts as our pairs do."""
    peer = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    special = {name: getattr(tiny_shards.special, name) for name in ("pad", "unk", "cls", "sep", "mask")}
    model = CrossEncoder(scorer(architecture, vocab=tiny_shards.vocab_size, special=special,
                                max_position_embeddings=40))
    model.save(tmp_path, tiny_shards.tokenizer_dir, 24)
    other = peer.CrossEncoder(str(tmp_path), device="cpu")
    table, texts = tiny_shards.queries("train"), passages()
    asked = {q.id: q.text for q in queries()}
    rows = [row for row in range(len(table)) if table.lengths[row] < 9]
    short = [i for i in range(len(texts)) if tiny_shards.docs.lengths[i] < 28]
    chosen = [(row, doc) for row in rows for doc in short]
    expected = other.predict([(asked[table.id(row)], f"{texts[doc].title or '-'} [SEP] {texts[doc].text}")
                              for row, doc in chosen], show_progress_bar=False)
    batch = read_pairs(tiny_shards, table, *np.array(chosen).T, 24)
    assert (batch.attention_mask.sum(1) == 24).any() and (batch.attention_mask.sum(1) < 24).any()
    with torch.no_grad():
        found = model(**batch.arguments())
    torch.testing.assert_close(found, torch.from_numpy(np.asarray(expected)), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 24


def test_a_lexicon_encoder_is_not_made_of_a_cross_encoder(shards_dir, tmp_path):
    """Nor the other way round: the two are artifacts of different kinds."""
    from lexmae import artifact
    from lexmae.retrieval import encode

    with artifact.create(tmp_path / "model", "reranker") as draft:
        CrossEncoder(scorer()).save(draft.path)
    with pytest.raises(InputError, match="is of kind 'reranker', but 'model' is needed here"):
        encode.encode(tmp_path / "model", shards_dir, tmp_path / "v", encode.EncodeConfig("docs"))


def test_lengths_that_it_reads():
    assert CrossEncoder(scorer()).max_length == 24
    assert CrossEncoder(scorer("roberta")).max_length == 24 - SPECIAL["pad"] - 1


def test_weights_gathered_from_elsewhere_are_written(tmp_path, shards_dir):
    from lexmae.model.reranker import save_scorer

    model, other = scorer(seed=1), scorer(seed=2)
    save_scorer(model, tmp_path, state_dict=other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(CrossEncoder.load(tmp_path).eval()(**pairs()), CrossEncoder(other)(**pairs()))


