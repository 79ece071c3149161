"""The weak decoder of pre-training: transformer layers of a backbone's own kind, whatever that is.

Shapes: B sequences, L tokens, N tokens of all sequences without padding, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from lexmae.errors import InputError
from lexmae.model.attention import run_packed
from lexmae.model.backbone import positions, transform, word_embeddings
from lexmae.model.packing import Packing


class _PassThrough(nn.Module):
    """Stands where a backbone's embeddings stood: what comes in as `inputs_embeds` goes on unchanged."""

    def forward(self, input_ids: None = None, inputs_embeds: Any = None, *_: Any, **__: Any) -> Tensor:
        return inputs_embeds


class _OutputBias(nn.Module):
    """Stands where a backbone's output projection stood, and keeps its bias [V] only."""

    def __init__(self, bias: nn.Parameter | None):
        super().__init__()
        self.bias = bias


class Decoder(nn.Module):
    """Transformer layers of a backbone's own kind, an LM-head transform and an output bias.

    It owns neither embeddings nor an output matrix: the caller embeds its input and multiplies its output
    with the word embeddings of the encoder, which is what ties the two.
    """

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        lm.base_model.embeddings = _PassThrough()
        lm.set_output_embeddings(_OutputBias(lm.get_output_embeddings().bias))
        self.layers = lm

    @property
    def bias(self) -> nn.Parameter | None:
        """The output bias [V] (None where the backbone has none)."""
        return self.layers.get_output_embeddings().bias

    def forward(self, embedded: Tensor, attention_mask: Tensor, packing: Packing | None = None) -> Tensor:
        """Embedded tokens [B, L, H] -> last hidden states [B, L, H]; [N, H] -> [N, H] where there is a packing."""
        if packing is not None:
            inputs = {"inputs_embeds": embedded.unsqueeze(0), "position_ids": positions(self.layers, packing)}
            return run_packed(self.layers, packing, **inputs)
        return self.layers.base_model(inputs_embeds=embedded, attention_mask=attention_mask).last_hidden_state

    def transform(self, hidden: Tensor) -> Tensor:
        """The LM head up to the output matrix: [..., H] -> [..., H]."""
        return transform(self.layers, hidden)


def new_decoder(lm: PreTrainedModel, n_layers: int) -> Decoder:
    """A randomly initialised decoder of `n_layers` layers of `lm`'s own kind (SPEC §1)."""
    if n_layers < 1:
        raise InputError(f"the decoder needs at least one layer, not {n_layers}")
    config = copy.deepcopy(lm.config)
    pattern = getattr(config, "layer_types", None)
    config.num_hidden_layers = n_layers
    if pattern:
        config.layer_types = [pattern[i % len(pattern)] for i in range(n_layers)]
    attention = lm.config._attn_implementation
    small = AutoModelForMaskedLM.from_config(config, dtype=lm.dtype, attn_implementation=attention)
    return Decoder(small.to(word_embeddings(lm).device))
