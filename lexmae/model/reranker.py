"""The cross-encoder: one score for a query and a document that are read together, saved as a Hugging Face folder.

It is the teacher of stage 3, and reranks. The folder loads with `AutoModelForSequenceClassification`, and with
sentence-transformers' `CrossEncoder`, which gives the same scores.

Shapes: P pairs, L tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.encoder import load_tokenizer

KIND = "reranker"  # of the artifact
_PLAIN_SCORES = {"activation_fn": "torch.nn.modules.linear.Identity"}  # sentence-transformers applies a sigmoid else


class CrossEncoder(nn.Module):
    """score = head(encoder(query, document)), without an activation behind it.

    Args:
        scorer: a sequence classifier of one output.
    """

    def __init__(self, scorer: PreTrainedModel):
        super().__init__()
        self.scorer = scorer
        _compute_in_own_precision(scorer.classifier)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Scores [P] float32 of a padded batch, whose arguments are all [P, L]."""
        return backbone.scores(self.scorer, input_ids, attention_mask, token_type_ids).float()

    @property
    def max_length(self) -> int:
        """The most tokens that it reads."""
        return backbone.max_length(self.scorer)

    def save(self, folder: str | Path, tokenizer_dir: str | Path | None = None, max_length: int | None = None) -> None:
        """Write the model as `save_scorer` does."""
        save_scorer(self.scorer, folder, tokenizer_dir, max_length)

    @classmethod
    def load(cls, init: str | Path, **kw: Any) -> CrossEncoder:
        """A finished cross-encoder from a folder or a hub name.

        Raises:
            InputError: nothing to load, or a model without weights that score, such as a masked language model.
        """
        scorer, new = backbone.load_scorer(str(init), **kw)
        if new:
            raise InputError(f"is no finished cross-encoder: it has no {new[0]}", path=init)
        return cls(scorer)


def _compute_in_own_precision(head: nn.Module) -> None:
    """Keep autocast out of the layers that end in the score: in bf16 the scores of many documents would be equal."""
    plain = head.forward

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return plain(hidden.to(next(head.parameters()).dtype))

    head.forward = forward


def save_scorer(scorer: PreTrainedModel, folder: str | Path, tokenizer_dir: str | Path | None = None,
                max_length: int | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write a Hugging Face folder with safetensors.

    Args:
        scorer: the sequence classifier.
        folder: where to; made when missing.
        tokenizer_dir: a tokenizer's folder, which is copied.
        max_length: tokens of a pair, to which the copy of the tokenizer cuts.
        state_dict: replaces the scorer's own, for weights gathered from several ranks; same keys.
    """
    scorer.config.sentence_transformers = dict(_PLAIN_SCORES)
    backbone.save_weights(scorer, Path(folder), state_dict)
    if tokenizer_dir is not None:
        tokenizer = load_tokenizer(tokenizer_dir)
        if max_length is not None:
            tokenizer.model_max_length = max_length
        tokenizer.save_pretrained(folder)
