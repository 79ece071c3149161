"""Dense vectors of texts from the same model that gives the lexicon: for comparison, and for hybrid search.

Shapes: B sequences, L tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexmae.errors import InputError
from lexmae.model import backbone, foreign, lexicon
from lexmae.model.head import max_logits

REPRESENTATIONS = ("bottleneck", "cls", "mean")


class DenseEncoder(nn.Module):
    """The lexicon bottleneck `b = softmax(max over text tokens of logits) · E` (SPEC §1), `[CLS]`, or the mean.

    Args:
        lm: the masked language model.
        representation: `bottleneck`, what the decoder of pre-training reads, or `cls`, the last hidden state of the
            first token, or `mean`, that of all tokens on average (sentence encoders: Reimers and Gurevych, EMNLP 2019).
        head: implementation of the pooled head, see `head.max_logits`.
        unit: scale vectors to length 1.
    """

    def __init__(self, lm: PreTrainedModel, representation: str = "bottleneck", head: str = "auto", unit: bool = False):
        super().__init__()
        if representation not in REPRESENTATIONS:
            raise InputError(f"unknown representation '{representation}': known are {', '.join(REPRESENTATIONS)}")
        self.lm = lm
        self.representation = representation
        self.head = head
        self.unit = unit

    @property
    def dimensions(self) -> int:
        """H."""
        return backbone.word_embeddings(self.lm).shape[1]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        text_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Vectors [B, H] float32 of a padded batch, whose arguments are all [B, L].

        `text_mask` is true at text tokens, neither special nor padding.
        """
        hidden = backbone.hidden_states(self.lm, input_ids, attention_mask, token_type_ids)  # [B, L, H]
        vectors = self._pool(hidden, attention_mask, text_mask)
        return nn.functional.normalize(vectors, dim=-1) if self.unit else vectors

    def _pool(self, hidden: Tensor, attention_mask: Tensor, text_mask: Tensor) -> Tensor:
        if self.representation == "cls":
            return hidden[:, 0].float()
        if self.representation == "mean":
            weights = attention_mask.unsqueeze(-1).float()
            return (hidden.float() * weights).sum(1) / weights.sum(1).clamp_min(1)
        weight, bias = backbone.output_matrix(self.lm)
        pooled = max_logits(backbone.transform(self.lm, hidden), weight, bias, text_mask, self.head)  # [B, V]
        with torch.autocast(hidden.device.type, enabled=False):
            return lexicon.bottleneck(pooled, backbone.word_embeddings(self.lm))

    @classmethod
    def load(cls, init: str | Path, representation: str = "bottleneck", head: str = "auto", side: str = "docs",
             **kw: Any) -> DenseEncoder:
        """From a folder or a hub name; see `backbone.load_masked_lm` and `foreign.dense_plan` for keywords and errors.

        `cls` and `mean` do not read the LM head, so that a sentence encoder without one will do.
        """
        chosen, unit = foreign.dense_plan(init, side, representation)
        if representation == "bottleneck":
            lm = backbone.load_masked_lm(chosen.init, chosen.subfolder, **kw)
        else:
            lm, _ = backbone.load_masked_lm_with_new(chosen.init, chosen.subfolder, **kw)
        return cls(lm, representation, head, unit)
