"""How much arithmetic a step needs, and what share of the device's best that is (MFU).

Counted are the products that the model needs, whatever computes them: padding, recomputed activations, element-wise
functions, the optimizer and teachers are left out (as "model FLOPs" in PaLM, Chowdhery et al. 2022, appendix B). With
tokens T, layers' matrices of E entries in all, hidden size H and vocabulary V, a forward pass of a text of L tokens is

    layers      2·E·T + Σ over layers 4·H·L·min(L, 2·window + 1)
    transform   2·H²·T (what stands before the output matrix)
    head        2·H·V per text token, masked-LM loss 2·H·V per labelled row
    bottleneck  2·H·V per text; scores of a ranking batch 2·V per (query, document) of the global batch

A backward pass is twice that, except for the head's, which touches few entries and is not counted, and the
bottleneck's, which has a gradient on one side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lexmae.data.batches import PretrainBatch, RankingBatch, TextBatch
from lexmae.data.pairs import PairBatch
from lexmae.model import backbone, lexicon
from lexmae.model.attention import windows
from lexmae.model.pretrainer import Pretrainer
from lexmae.model.reranker import CrossEncoder
from lexmae.train.objectives import RankingModel

PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250, 75), "GH200": (989, 67), "H200": (989, 67), "H100 PCIe": (756, 51), "H100 NVL": (835, 60),
    "H100": (989, 67), "A100": (312, 19.5), "L40S": (362, 91.6), "L4": (121, 30.3), "A40": (149.7, 37.4),
    "A10G": (70, 35), "A10": (125, 31.2), "RTX A6000": (154.8, 38.7), "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71, 35.6), "V100": (125, 15.7), "T4": (65, 8.1),
}  # fmt: skip
"""TFLOP/s of dense products in half precision and in float32 by a part of the device's name, as vendors' data sheets
give them; the first that fits."""
_NO_BF16 = ("V100", "T4")


def peak(device: str, precision: str) -> float | None:
    """The best TFLOP/s of a device of this name in ``fp16``, ``bf16`` or ``fp32``; None where it is not known."""
    words = device.replace("-", " ")
    for name, (half, single) in PEAKS.items():
        if f" {name} " in f" {words} ":
            if precision == "bf16" and name in _NO_BF16:
                return None
            return single if precision == "fp32" else half
    return None


class Meter:
    """Adds up the arithmetic of a rank's micro-batches.

    Args:
        count: a micro-batch → FLOP; nothing is measured where there is none.
        best: TFLOP/s of the device, where they are known.
    """

    def __init__(self, count: Callable[[Any], float] | None = None, best: float | None = None):
        self._count, self._best, self._total = count, best, 0.0

    def add(self, batch: Any) -> None:
        """Count a micro-batch, which is best still on the CPU."""
        if self._count is not None:
            self._total += self._count(batch)

    def rates(self, seconds: float) -> dict[str, float]:
        """``tflops``, TFLOP/s of this rank since the last call, which took so long; ``mfu``, the share of the best."""
        if self._count is None:
            return {}
        rate, self._total = self._total / 1e12 / seconds, 0.0
        return {"tflops": rate, **({} if self._best is None else {"mfu": rate / self._best})}


def counter(model: nn.Module, world: int) -> Callable[[Any], float]:
    """A micro-batch of what ``model`` is trained on → FLOP of its forward and backward pass.

    Args:
        model: before DeepSpeed splits its parameters.
        world: number of ranks, which all compute the scores of the global batch.
    """
    if isinstance(model, Pretrainer):
        return _Pretraining(model)
    return _Ranking(model, world) if isinstance(model, RankingModel) else _Reranking(model)


class _Layers:
    """The transformer layers of a model: FLOP of a forward pass."""

    def __init__(self, lm: Any, hidden: int):
        self._per_token = 2 * _entries(lm.base_model)
        self._windows, self._hidden = Counter(windows(lm)), hidden

    def __call__(self, attention_mask: torch.Tensor) -> float:
        """Of texts with this mask, [B, L]."""
        lengths = attention_mask.sum(1).double()
        seen = sum(layers * (lengths * (lengths if reach is None else lengths.clamp(max=2 * reach + 1))).sum().item()
                   for reach, layers in self._windows.items())
        return self._per_token * lengths.sum().item() + 4 * self._hidden * seen


class _Lexicon:
    """Encoder and transform of a masked language model, and the size of a product with its output matrix."""

    def __init__(self, lm: Any):
        vocabulary, hidden = backbone.output_matrix(lm)[0].shape
        self._layers, self.row = _Layers(lm, hidden), 2 * hidden * vocabulary
        self.vocabulary = vocabulary
        self.transform = 2 * _entries(lm, without=(lm.base_model, lm.get_output_embeddings()))

    def __call__(self, text: TextBatch, pooled: bool = True) -> float:
        """Forward and backward pass."""
        tokens = int(text.attention_mask.sum())
        head = self.row * int(text.text_mask.sum()) if pooled else 0
        return 3 * (self._layers(text.attention_mask) + self.transform * tokens) + head


class _Pretraining:
    def __init__(self, model: Pretrainer):
        self._encoder = _Lexicon(model.lm)
        self._decoder = _Layers(model.decoder.layers, backbone.word_embeddings(model.lm).shape[1])
        self._transform = 2 * _entries(model.decoder.layers, without=(model.decoder.layers.base_model,))
        self._bottleneck = model.source in lexicon.LEXICON_SOURCES
        self._pooled = self._bottleneck or model.bag_of_words

    def __call__(self, batch: PretrainBatch) -> float:
        row = self._encoder.row
        losses = 3 * (row * (batch.enc_count + batch.dec_count) + self._transform * batch.dec_count)
        bottleneck = 2 * row * len(batch.enc_labels) if self._bottleneck else 0
        return (self._encoder(batch.text, self._pooled) + 3 * self._decoder(batch.text.attention_mask) + losses
                + bottleneck)


class _Ranking:
    def __init__(self, model: RankingModel, world: int):
        self._encoder, self._static, self._world = _Lexicon(model.encoder.lm), model.query_encoder is not None, world

    def __call__(self, batch: RankingBatch) -> float:
        encoded = [*batch.docs, *([] if self._static else batch.queries)]
        pairs = len(batch.query_order) * len(batch.doc_order) * self._world  # this rank's part of all
        return sum(self._encoder(text) for text in encoded) + 3 * 2 * self._encoder.vocabulary * pairs


class _Reranking:
    def __init__(self, model: CrossEncoder):
        self._layers = _Layers(model.scorer, backbone.word_embeddings(model.scorer).shape[1])

    def __call__(self, batch: PairBatch) -> float:
        return 3 * self._layers(batch.attention_mask)


def _entries(module: nn.Module, without: tuple[nn.Module, ...] = ()) -> int:
    """Entries of the matrices that are applied to every token."""
    left_out = {id(part) for other in without for part in other.modules()}
    return sum(part.in_features * part.out_features for name, part in module.named_modules()
               if isinstance(part, nn.Linear) and id(part) not in left_out and "pooler" not in name)
