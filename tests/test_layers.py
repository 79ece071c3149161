"""Compiled and recomputed layers: the losses and gradients of plain ones."""

from __future__ import annotations

import pytest
import torch
from test_packing import assert_same, example, gradients
from tiny_models import SIZES, tiny

from lexmae.config import ModelConfig, OptimizationConfig, PretrainRecipe
from lexmae.model import attention, layers
from lexmae.model.pretrainer import Pretrainer
from lexmae.train import parts
from lexmae.train.hardware import Hardware

DROPOUT = {
    "distilbert": {"dropout": 0.1, "attention_dropout": 0.1},
    "modernbert": {"embedding_dropout": 0.1, "mlp_dropout": 0.1, "attention_dropout": 0.1},
}


def trained(family: str, packed: bool, change, **size) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients of a step in training mode; ``change`` is applied to both transformers."""
    lm = tiny(family, **size)
    if packed:
        attention.use_packing(lm)
    torch.manual_seed(1)
    model = Pretrainer(lm, 2).train()
    for each in (model.lm, model.decoder.layers):
        change(each)
    torch.manual_seed(2)
    out = model(**example())
    (out["enc_loss_sum"] + out["dec_loss_sum"]).backward()
    return {name: value.detach() for name, value in out.items()}, gradients(model)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", SIZES)
def test_recomputed_layers(family, packed):
    """With the same dropout, and every layer computed twice."""
    size = DROPOUT.get(family, {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1})
    calls = []

    def counted(lm) -> None:
        first = next(module for module in lm.base_model.modules() if isinstance(module, torch.nn.Linear))
        first.register_forward_hook(lambda *_: calls.append(1))

    expected = trained(family, packed, counted, **size)
    assert len(calls) == 2  # encoder and decoder
    found = trained(family, packed, lambda lm: (counted(lm), layers.recompute_layers(lm)), **size)
    assert len(calls) == 2 + 4
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_compiled_layers(family, packed):
    expected = trained(family, packed, lambda lm: None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = trained(family, packed, lambda lm: layers.compile_layers(lm, "aot_eager"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])


def test_compiled_layers_keep_the_names_of_weights():
    lm = tiny()
    names = set(lm.state_dict())
    layers.compile_layers(lm, "eager")
    assert set(lm.state_dict()) == names


@pytest.mark.parametrize("option", ["compile", "activation_checkpointing"])
def test_a_recipe_asks_for_them(option, tiny_shards, monkeypatch):
    changed = []
    monkeypatch.setattr(layers, "compile_layers", lambda lm: changed.append(("compile", lm)))
    monkeypatch.setattr(layers, "recompute_layers", lambda lm: changed.append(("activation_checkpointing", lm)))
    recipe = PretrainRecipe(data="", output="", model=ModelConfig(init="scratch", **{option: True}),
                            optimization=OptimizationConfig(batch=4))
    lm = tiny()
    built = parts.build(recipe, lm, tiny_shards, parts.Place(Hardware(1, 4, 1, {}), 0, None, None))
    assert changed == [(option, lm), (option, built.model.decoder.layers)]
