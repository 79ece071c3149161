from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SIZES, SPECIAL, VOCAB, batch, tiny
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel

from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.decoder import new_decoder

ALL = sorted(backbone.FAMILIES)


def own_arguments(architecture: str, inputs: dict) -> dict:
    """What the family's own forward takes of a batch."""
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if architecture == "bert" else [])
    return {name: inputs[name] for name in names}


def test_every_family_has_a_tiny_model():
    assert sorted(SIZES) == ALL


@pytest.mark.parametrize("architecture", ALL)
def test_pieces_compose_to_the_models_own_logits(architecture):
    lm, inputs = tiny(architecture), batch()
    expected = lm(**own_arguments(architecture, inputs)).logits
    hidden = backbone.hidden_states(lm, inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    weight, bias = backbone.output_matrix(lm)
    got = F.linear(backbone.transform(lm, hidden), weight, bias)
    torch.testing.assert_close(got, expected)
    assert got.std() > 0.1


@pytest.mark.parametrize("architecture", ALL)
def test_output_matrix_is_tied_and_bias_present(architecture):
    lm = tiny(architecture)
    weight, bias = backbone.output_matrix(lm)
    assert weight is backbone.word_embeddings(lm)
    assert weight.shape == (VOCAB, 16) and bias.shape == (VOCAB,)


@pytest.mark.parametrize("architecture", ALL)
def test_embed_is_what_the_first_layer_reads(architecture):
    lm, inputs = tiny(architecture), batch()
    seen = []
    handle = lm.base_model.embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
    backbone.hidden_states(lm, inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    handle.remove()
    torch.testing.assert_close(backbone.embed(lm, inputs["input_ids"], inputs["token_type_ids"]), seen[0])


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_does_not_change_hidden_states(architecture, dtype):
    lm, inputs = tiny(architecture), batch()
    mask = inputs["attention_mask"].to(dtype)
    together = backbone.hidden_states(lm, inputs["input_ids"], mask, inputs["token_type_ids"])
    alone = backbone.hidden_states(lm, *(inputs[k][2:, :5] for k in ("input_ids", "attention_mask", "token_type_ids")))
    torch.testing.assert_close(together[2:, :5], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["roberta", "xlm-roberta"])
def test_roberta_positions_start_after_the_padding_id(architecture):
    lm = tiny(architecture, special={**SPECIAL, "pad": 1, "unk": 0})
    inputs = batch(pad=1)
    table = lm.base_model.embeddings
    position = torch.where(inputs["attention_mask"].bool(), torch.arange(12) + 2, 1)
    words = backbone.word_embeddings(lm)[inputs["input_ids"]]
    expected = table.LayerNorm(words + table.position_embeddings(position) + table.token_type_embeddings.weight[0])
    torch.testing.assert_close(backbone.embed(lm, inputs["input_ids"], inputs["token_type_ids"]), expected)
    assert backbone.max_length(lm) == 24 - 2


def test_max_length_is_usable_for_every_family():
    for architecture in ALL:
        lm = tiny(architecture)
        ids = torch.full((1, backbone.max_length(lm)), 7)
        backbone.hidden_states(lm, ids, torch.ones_like(ids), torch.zeros_like(ids))
        assert backbone.max_length(tiny("bert")) == 24


def test_segments_matter_to_bert_only():
    for architecture in ALL:
        lm, inputs = tiny(architecture), batch()
        with_ids = backbone.hidden_states(lm, inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
        without = backbone.hidden_states(lm, inputs["input_ids"], inputs["attention_mask"], None)
        assert torch.equal(with_ids, without) == (architecture != "bert")


# ------------------------------------------------------------------------------------------------- creation


def test_scratch_is_a_function_of_the_seed():
    def first(seed):
        torch.manual_seed(seed)
        return backbone.create_masked_lm("bert", VOCAB, SPECIAL, SIZES["bert"]).state_dict()

    one, same, other = first(3), first(3), first(4)
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(one[name], other[name])


@pytest.mark.parametrize("architecture", ALL)
def test_scratch_keeps_ids_and_sizes(architecture):
    lm = backbone.create_masked_lm(architecture, VOCAB, {**SPECIAL, "pad": 5}, SIZES[architecture])
    assert lm.config.pad_token_id == 5 and lm.config.vocab_size == VOCAB
    assert lm.config.num_hidden_layers == 3 and lm.config.hidden_size == 16
    assert lm.get_input_embeddings().padding_idx == 5
    assert lm.config.cls_token_id == SPECIAL["cls"] and lm.config.sep_token_id == SPECIAL["sep"]


def test_dropout_rates_pass_through():
    lm = backbone.create_masked_lm("bert", VOCAB, SPECIAL, {**SIZES["bert"], "hidden_dropout_prob": 0.25})
    assert lm.bert.encoder.layer[0].output.dropout.p == 0.25


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("gpt2", VOCAB, SPECIAL, {}), ["gpt2", "modernbert"]),
        (("bert", VOCAB, SPECIAL, {"width": 8}), ["width", "hidden_size", "num_hidden_layers"]),
        (("distilbert", VOCAB, SPECIAL, {"layers": 2}), ["layers", "n_layers", "dim"]),
        (("bert", VOCAB, SPECIAL, {"hidden_size": 10, "num_attention_heads": 4}), ["bert", "10"]),
        (("bert", VOCAB, SPECIAL, {"hidden_size": "wide"}), ["hidden_size"]),
        (("bert", VOCAB, SPECIAL, {"hidden_act": "foo"}), ["foo"]),
        (("bert", VOCAB, SPECIAL, {"num_attention_heads": 0}), ["zero"]),
        (("bert", VOCAB, SPECIAL, {"num_hidden_layers": 0}), ["num_hidden_layers"]),
        (("modernbert", VOCAB, SPECIAL, {"hidden_size": -4}), ["modernbert"]),
        (("bert", VOCAB, {"cls": 2}, {}), ["padding"]),
        (("bert", VOCAB, {"pad": VOCAB}, {}), ["pad", str(VOCAB)]),
    ],
)
def test_bad_scratch_models_are_one_clear_line(arguments, words):
    with pytest.raises(InputError) as error:
        backbone.create_masked_lm(*arguments)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


# -------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("architecture", ALL)
def test_save_and_load_round_trip(architecture, tmp_path):
    lm, inputs = tiny(architecture), batch()
    lm.save_pretrained(tmp_path)
    expected = lm(**own_arguments(architecture, inputs)).logits
    loaded = backbone.load_masked_lm(str(tmp_path)).eval()
    assert backbone.output_matrix(loaded)[0] is backbone.word_embeddings(loaded)
    torch.testing.assert_close(loaded(**own_arguments(architecture, inputs)).logits, expected, rtol=0, atol=0)
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(**own_arguments(architecture, inputs)).logits, expected, rtol=0, atol=0)


def test_half_precision_checkpoints_load_in_float32(tmp_path):
    tiny("bert").half().save_pretrained(tmp_path)
    assert backbone.word_embeddings(backbone.load_masked_lm(str(tmp_path))).dtype == torch.float32
    assert backbone.load_masked_lm(str(tmp_path), dtype=torch.float16).dtype == torch.float16


def test_sparse_prediction_is_switched_off(tmp_path):
    lm = tiny("modernbert")
    lm.config.sparse_prediction = True
    lm.save_pretrained(tmp_path)
    loaded, inputs = backbone.load_masked_lm(str(tmp_path)), batch()
    assert not loaded.sparse_prediction and not loaded.config.sparse_prediction
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, 3] = 5
    assert loaded(inputs["input_ids"], inputs["attention_mask"], labels=labels).logits.shape == (3, 12, VOCAB)


def test_an_encoder_checkpoint_with_a_pooler_loads_without_it(tmp_path):
    config = BertConfig(vocab_size=VOCAB, **SIZES["bert"])
    BertModel(config).save_pretrained(tmp_path)
    lm, _ = backbone.load_masked_lm_with_new(str(tmp_path))
    assert isinstance(lm, BertForMaskedLM) and not any("pooler" in name for name, _ in lm.named_parameters())


@pytest.mark.parametrize("init", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/model"])
def test_missing_folders_are_named(init):
    with pytest.raises(InputError, match="no such model folder"):
        backbone.load_masked_lm(init)


def test_an_empty_name_is_refused():
    with pytest.raises(InputError, match="is needed"):
        backbone.load_masked_lm("")


def test_folder_without_config(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        backbone.load_masked_lm(str(tmp_path))


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"model_type": "gpt2"}', '{"model_type": "no-such"}', '{"model_type": "bert"}']
)
def test_broken_folders_are_one_clear_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError) as error:
        backbone.load_masked_lm(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_damaged_weights_are_one_clear_line(tmp_path, content):
    backbone.save_weights(tiny("bert"), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError) as error:
        backbone.load_masked_lm(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("values", [3, {"num_attention_heads": 0}, {"dtype": "foo"}, {"pad_token_id": 99999}])
def test_other_values_in_a_configuration_are_one_clear_line(tmp_path, values):
    backbone.save_weights(tiny("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values if isinstance(values, int) else {**config, **values}))
    with pytest.raises(InputError):
        backbone.load_masked_lm(str(tmp_path))


def test_unreachable_hub_names_are_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        backbone.load_masked_lm("nobody/no-such-model")
    assert "nobody/no-such-model" in str(error.value) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- decoder


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_decoder_owns_layers_transform_and_bias_only(architecture, n_layers):
    lm = tiny(architecture)
    decoder = new_decoder(lm, n_layers)
    shapes = [tuple(p.shape) for p in decoder.parameters()]
    assert shapes.count((VOCAB,)) == 1 and decoder.bias.shape == (VOCAB,)
    assert not any(VOCAB in shape and len(shape) == 2 for shape in shapes)
    assert not any("embed" in name for name, _ in decoder.named_parameters())
    per_layer = sum(name.endswith(("output.dense.weight", "lin2.weight", "mlp.Wo.weight")) and "attention" not in name
                    for name, _ in decoder.named_parameters())
    assert per_layer == n_layers
    encoder = {id(p) for p in lm.parameters()}
    assert not any(id(p) in encoder for p in decoder.parameters())
    assert decoder.training and lm.config.num_hidden_layers == 3


@pytest.mark.parametrize("architecture", ALL)
def test_decoder_with_the_encoders_weights_is_the_encoder(architecture):
    """As many layers and the same weights: the decoder of embedded ids gives the encoder's hidden states."""
    lm, inputs = tiny(architecture), batch()
    decoder = new_decoder(lm, 3).eval()
    source = dict(lm.named_parameters(remove_duplicate=False))
    for name, parameter in decoder.layers.named_parameters():
        parameter.data.copy_(source[name])
    embedded = backbone.embed(lm, inputs["input_ids"], inputs["token_type_ids"])
    got = decoder(embedded, inputs["attention_mask"])
    hidden = backbone.hidden_states(lm, inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    torch.testing.assert_close(got, hidden)
    torch.testing.assert_close(decoder.transform(got), backbone.transform(lm, hidden))


def test_modernbert_decoder_repeats_the_attention_pattern():
    lm = tiny("modernbert")
    assert lm.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    for n in (1, 2, 5):
        types = [layer.attention_type for layer in new_decoder(lm, n).layers.model.layers]
        assert types == [lm.config.layer_types[i % 3] for i in range(n)]


def test_decoder_needs_a_layer():
    with pytest.raises(InputError, match="at least one layer"):
        new_decoder(tiny(), 0)
