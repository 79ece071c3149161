"""A fitted LM head names the tokens of the text in every family, before any training."""

from __future__ import annotations

import pytest
import torch
from test_lexical_start import SIZES, SPECIAL

from lexmae.config import ModelConfig
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.dense import DenseEncoder
from lexmae.model.encoder import SparseEncoder
from lexmae.model.head_fit import fit_transform
from lexmae.train.parts import build_lm


def texts(seed: int) -> dict[str, torch.Tensor]:
    """32 texts of 14 tokens, the last four of them padding."""
    ids = torch.randint(5, 500, (32, 18), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, 13], ids[:, 14:] = SPECIAL["cls"], SPECIAL["sep"], SPECIAL["pad"]
    text = ids > 4
    return {"input_ids": ids, "attention_mask": (ids != SPECIAL["pad"]).long(), "text_mask": text}


def random_lm(family: str):
    torch.manual_seed(0)
    return backbone.create_masked_lm(family, 500, SPECIAL, SIZES[family])


def named(lm) -> float:
    """Share of the tokens of unseen texts that are among the twelve heaviest entries of their text."""
    batch = texts(99)
    with torch.no_grad():
        top = SparseEncoder(lm).eval()(**batch).topk(12).indices
    return sum(len(set(row[mask].tolist()) & set(top[i].tolist())) / len(set(row[mask].tolist()))
               for i, (row, mask) in enumerate(zip(batch["input_ids"], batch["text_mask"], strict=True))) / 32


@pytest.mark.parametrize("family", SIZES)
def test_own_tokens_lead(family):
    lm = random_lm(family)
    assert named(lm) < 0.5
    layers = {name: tensor.clone() for name, tensor in lm.base_model.state_dict().items()}
    share = fit_transform(lm, (texts(i) for i in range(8)))
    assert share > 0.9 and named(lm) > 0.9
    assert all(torch.equal(tensor, layers[name]) for name, tensor in lm.base_model.state_dict().items())


def test_the_bias_leaves_each_token_about_32_entries():
    lm = random_lm("bert")
    fit_transform(lm, [texts(i) for i in range(4)])
    hidden = backbone.hidden_states(lm, **{k: v for k, v in texts(3).items() if k != "text_mask"})
    weight, bias = backbone.output_matrix(lm)
    active = ((backbone.transform(lm, hidden) @ weight.T + bias) > 0)[texts(3)["text_mask"]].sum(1).float().mean()
    assert 20 < active < 48


def test_the_mode_of_the_model_is_left_alone():
    lm = random_lm("bert").train()
    fit_transform(lm, [texts(0)])
    assert lm.training


def test_nothing_to_fit_to_is_said():
    with pytest.raises(InputError, match="no text"):
        fit_transform(random_lm("bert"), [])


def test_a_backbone_without_a_head_gets_one(tmp_path, shards_dir, capsys):
    shards = Shards.open(shards_dir)
    special = {"pad": shards.special.pad, "cls": shards.special.cls, "sep": shards.special.sep}
    torch.manual_seed(0)
    whole = backbone.create_masked_lm("bert", shards.vocab_size, special, SIZES["bert"])
    whole.base_model.save_pretrained(tmp_path / "headless")
    backbone.save_weights(whole, tmp_path / "whole")
    assert backbone.load_masked_lm_with_new(str(tmp_path / "whole"))[1] == []
    lm, new = backbone.load_masked_lm_with_new(str(tmp_path / "headless"))
    assert any("transform.dense" in name for name in new)

    fitted = build_lm(ModelConfig(init=str(tmp_path / "headless")), shards)
    assert "has no LM head" in capsys.readouterr().err
    again = build_lm(ModelConfig(init=str(tmp_path / "headless")), shards)
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), again.parameters(), strict=True))
    assert not torch.equal(backbone.head_layers(fitted)[0].weight, backbone.head_layers(lm)[0].weight)
    capsys.readouterr()
    build_lm(ModelConfig(init=str(tmp_path / "headless"), fit_head=False), shards)
    build_lm(ModelConfig(init=str(tmp_path / "whole")), shards)
    assert "LM head" not in capsys.readouterr().err


def test_without_training_a_backbone_without_a_head_has_dense_vectors_only(tmp_path):
    random_lm("bert").base_model.save_pretrained(tmp_path)
    for load in (backbone.load_masked_lm, SparseEncoder.load, DenseEncoder.load):
        with pytest.raises(InputError, match="has no LM head .* train one from it first"):
            load(str(tmp_path))
    assert DenseEncoder.load(tmp_path, "cls").dimensions == 96


def test_weights_missing_inside_are_refused(tmp_path):
    lm = random_lm("bert")
    kept = {name: tensor for name, tensor in lm.state_dict().items() if "layer.1." not in name}
    from safetensors.torch import save_file

    lm.config.save_pretrained(tmp_path)
    save_file({name: tensor.clone().contiguous() for name, tensor in kept.items() if "decoder" not in name},
              tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="lacks weights of the encoder"):
        backbone.load_masked_lm_with_new(str(tmp_path))
