"""Counted arithmetic, against torch's own counter and by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_objectives import N_DOCS, ranking_batch, text
from tiny_models import SIZES, VOCAB, batch, tiny
from torch.utils.flop_counter import FlopCounterMode

from lexmae.data.batches import PretrainBatch, TextBatch
from lexmae.data.pairs import PairBatch
from lexmae.model import backbone
from lexmae.model.encoder import SparseEncoder
from lexmae.model.pretrainer import Pretrainer
from lexmae.model.reranker import CrossEncoder
from lexmae.train import flops
from lexmae.train.objectives import RankingModel

HIDDEN = 16


def measured(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", SIZES)
def test_layers_and_transform_against_torchs_counter(family):
    """Without padding, and within the window of the family that has one."""
    lm, inputs = tiny(family), batch(0, (5, 5, 5))
    lm.set_attn_implementation("eager")
    mask, size = inputs["attention_mask"], torch.randn(3, 5, HIDDEN)
    counted = flops._Layers(lm, HIDDEN)(mask)
    assert counted == measured(lambda: backbone.hidden_states(lm, inputs["input_ids"], mask))
    assert flops._Lexicon(lm).transform * 15 == measured(lambda: backbone.transform(lm, size))
    decoder = Pretrainer(lm, 2).decoder
    assert flops._Layers(decoder.layers, HIDDEN)(mask) == measured(lambda: decoder(size, mask))


def test_a_window_limits_what_is_seen():
    lm = tiny("modernbert")  # two tokens to each side in all but the first of three layers
    assert sorted(flops.windows(lm), key=str) == [2, 2, None]
    few, many = (flops._Layers(lm, HIDDEN)(torch.ones(1, n)) for n in (10, 20))
    assert many - 2 * few == 4 * HIDDEN * (20 * 20 - 2 * 10 * 10)


def test_padding_is_not_counted():
    layers = flops._Layers(tiny(), HIDDEN)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert layers(mask) == layers(torch.ones(1, 3)) + layers(torch.ones(1, 5))


@pytest.mark.parametrize("source", ["logits", "cls"])
def test_pretraining(source):
    model, inputs = Pretrainer(tiny(), 2, source), batch(0, (9, 5))
    labels = torch.zeros(2, 9)
    found = flops.counter(model, 1)(PretrainBatch(TextBatch(**inputs), labels, labels, labels, 4, 6))
    mask, row = inputs["attention_mask"], 2 * HIDDEN * VOCAB
    expected = 3 * (flops._Layers(model.lm, HIDDEN)(mask) + flops._Layers(model.decoder.layers, HIDDEN)(mask)
                    + 2 * HIDDEN * HIDDEN * (14 + 6) + row * 10)
    if source == "logits":
        expected += row * int(inputs["text_mask"].sum()) + 2 * row * 2
    assert found == expected


@pytest.mark.parametrize("static", [False, True])
def test_ranking(static):
    texts = text(1, (6, 5)), text(2, (12, 9, 8, 7, 5, 4))
    lm = tiny()
    model = RankingModel(SparseEncoder(lm), query_encoder=torch.nn.Identity() if static else None)
    found = flops.counter(model, 2)(ranking_batch(texts, 2))
    layers, expected = flops._Layers(lm, HIDDEN), 3 * 2 * VOCAB * (2 * 2 * N_DOCS * 2)
    for each in texts[1:] if static else texts:
        expected += 3 * (layers(each.attention_mask) + 2 * HIDDEN * HIDDEN * int(each.attention_mask.sum()))
        expected += 2 * HIDDEN * VOCAB * int(each.text_mask.sum())
    assert found == expected


def test_reranking():
    scorer = backbone.create_scorer("bert", VOCAB, {"pad": 0}, SIZES["bert"])
    inputs = batch(0, (9, 5))
    del inputs["text_mask"]
    found = flops.counter(CrossEncoder(scorer), 1)(PairBatch(**inputs))
    assert found == 3 * flops._Layers(tiny(), HIDDEN)(inputs["attention_mask"])


@pytest.mark.parametrize(("device", "precision", "expected"), [
    ("NVIDIA H100 80GB HBM3", "bf16", 989), ("NVIDIA H100 PCIe", "fp16", 756), ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
    ("NVIDIA L4", "bf16", 121), ("NVIDIA L40S", "bf16", 362), ("NVIDIA A10G", "fp16", 70), ("Tesla T4", "fp16", 65),
    ("Tesla T4", "bf16", None), ("Tesla V100-SXM2-16GB", "bf16", None), ("NVIDIA GeForce GT 710", "fp16", None)])
def test_devices_at_their_best(device, precision, expected):
    assert flops.peak(device, precision) == expected


def test_rates_are_of_the_time_since_the_last():
    meter = flops.Meter(lambda batch: batch.work, best=4.0)
    for work in (1e12, 3e12):
        meter.add(SimpleNamespace(work=work))
    assert meter.rates(2.0) == {"tflops": 2.0, "mfu": 0.5}
    assert meter.rates(2.0) == {"tflops": 0.0, "mfu": 0.0}
    assert flops.Meter(lambda batch: 1.0).rates(1.0) == {"tflops": 0.0}
    nothing = flops.Meter()
    nothing.add(None)
    assert nothing.rates(1.0) == {}
