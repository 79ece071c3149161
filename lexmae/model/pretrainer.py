"""LexMAE pre-training: a masked language model, its lexicon bottleneck, and a weak decoder that must use it.

The rules are those of SPEC §1.

Shapes: B sequences, L tokens, N tokens of all sequences without padding, H hidden size, V vocabulary, M labelled
positions of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexmae.errors import InputError
from lexmae.model import attention, backbone, lexicon
from lexmae.model.decoder import new_decoder
from lexmae.model.head import max_logits
from lexmae.model.mlm import cross_entropy_sum
from lexmae.model.packing import Packing

IGNORE = -100
"""The label of a position without a loss."""


class Pretrainer(nn.Module):
    """Encoder `lm`, bottleneck and decoder.

    Args:
        lm: the backbone, from `backbone.load_masked_lm` or `create_masked_lm`; trained in place. It alone is
            exported: the decoder is dropped after pre-training.
        n_decoder_layers: layers of the weak decoder, of the backbone's own kind, randomly initialised here.
        bottleneck: where b comes from: `logits` (the paper), `saturated`, `cls`, or `off`.
        head: implementation of the output matrix's products, see `head.max_logits`.
        bag_of_words: also compute the loss of `lexicon.bag_of_words_loss`, whatever the bottleneck is made of.
        normalize: give a bottleneck made of the lexicon the length of the decoder's other inputs.
    """

    def __init__(
        self, lm: PreTrainedModel, n_decoder_layers: int = 2, bottleneck: str = "logits", head: str = "auto",
        bag_of_words: bool = False, normalize: bool = False,
    ):  # fmt: skip
        super().__init__()
        if bottleneck not in lexicon.SOURCES:
            raise InputError(f"unknown bottleneck {bottleneck!r}; known: {', '.join(lexicon.SOURCES)}")
        self.lm = lm
        self.decoder = new_decoder(lm, n_decoder_layers)
        self.source = bottleneck
        self.head = head
        self.bag_of_words = bag_of_words
        self.normalize = normalize

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        text_mask: Tensor,
        token_type_ids: Tensor | None,
        enc_labels: Tensor | None = None,
        dec_input_ids: Tensor | None = None,
        dec_labels: Tensor | None = None,
    ) -> dict[str, Tensor] | Tensor:
        """Sums and counts of the two losses, so that the caller may divide by a global count.

        Without labels, the lexicon vectors [B, V] of the texts, as `SparseEncoder` gives them.

        Args, all [B, L]:
            input_ids, enc_labels: encoder-masked ids; true ids at the masked positions, IGNORE elsewhere.
            attention_mask: 1 at tokens, 0 at padding.
            text_mask: true at text tokens, masked ones included; false at special tokens and padding.
            token_type_ids: segments, used where the backbone has them.
            dec_input_ids, dec_labels: the same for the decoder.

        Returns:
            `enc_loss_sum`, `enc_count`, `enc_correct`, `dec_loss_sum`, `dec_count`, `dec_correct`: float32
            scalars; the losses are sums of cross entropies over labelled positions. `bow_loss_sum`: sum over the
            texts, where there is a bag-of-words loss. `bottleneck`: [B, H], what the decoder reads at position 0.
        """
        packing = attention.packing(self.lm, attention_mask)
        hidden = backbone.hidden_states(self.lm, input_ids, attention_mask, token_type_ids, packing)  # or [N, H]
        features = backbone.transform(self.lm, hidden)
        weight, bias = backbone.output_matrix(self.lm)
        pooled = None
        if enc_labels is None or self.bag_of_words or self.source in lexicon.LEXICON_SOURCES:
            pooled = max_logits(features, weight, bias, text_mask, self.head, packing)  # [B, V]
        if enc_labels is None:
            return lexicon.saturate(pooled)
        as_features = packing.pack if packing else lambda labels: labels
        encoder = masked_lm_loss(features, weight, bias, as_features(enc_labels), head=self.head)

        embedded, vector = self._decoder_input(dec_input_ids, token_type_ids, hidden, pooled, packing)
        decoded = self.decoder(embedded, attention_mask, packing)
        tied = backbone.word_embeddings(self.lm)
        decoder = masked_lm_loss(decoded, tied, self.decoder.bias, as_features(dec_labels), self.decoder.transform,
                                 self.head)
        bag = {}
        if self.bag_of_words:
            shown = torch.where(enc_labels == IGNORE, input_ids, enc_labels)  # the text before masking
            bag["bow_loss_sum"] = lexicon.bag_of_words_loss(pooled, shown, text_mask)
        return {
            **bag,
            **{f"enc_{name}": value for name, value in encoder.items()},
            **{f"dec_{name}": value for name, value in decoder.items()},
            "bottleneck": vector,
        }

    def _decoder_input(
        self, ids: Tensor, token_type_ids: Tensor | None, hidden: Tensor, pooled: Tensor | None,
        packing: Packing | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Embedded tokens [B, L, H] or [N, H], the bottleneck in the first place of each text, and that [B, H]."""
        embedded = backbone.embed(self.lm, ids, token_type_ids, packing)
        vector = self._bottleneck(hidden, pooled, packing)
        if vector is None:
            return embedded, _first(embedded, packing)
        low = vector.to(embedded.dtype)
        if packing is None:
            return torch.cat([low.unsqueeze(1), embedded[:, 1:]], dim=1), vector
        return embedded.index_copy(0, packing.first, low), vector

    def _bottleneck(self, hidden: Tensor, pooled: Tensor | None, packing: Packing | None) -> Tensor | None:
        """b [B, H], or None when the decoder keeps its own [CLS] embedding."""
        if self.source == "off":
            return None
        if self.source == "cls":
            return _first(hidden, packing)
        return lexicon.bottleneck(pooled, backbone.word_embeddings(self.lm), self.source, self.normalize)


def _first(tokens: Tensor, packing: Packing | None) -> Tensor:
    """The first token of each text, [B, H] of [B, L, H] or [N, H]."""
    return tokens[:, 0] if packing is None else tokens[packing.first]


def masked_lm_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    transform: Callable[[Tensor], Tensor] | None = None,
    head: str = "auto",
) -> dict[str, Tensor]:
    """Cross entropy of features at the labelled positions only.

    Args:
        features: [B, L, H] or [N, H]; `transform` is applied to the labelled rows first.
        weight, bias: output matrix [V, H] and its bias [V] or None.
        labels: [B, L] or [N], IGNORE where there is no loss.
        head: implementation, see `head.max_logits`.

    Returns:
        float32 scalars `loss_sum`, `count`, `correct` (label among the largest logits). Without a labelled
        position all are 0, with zero gradients.
    """
    chosen = labels != IGNORE
    rows = features[chosen]  # [M, H]
    if transform is not None:
        rows = transform(rows)
    loss_sum, correct = cross_entropy_sum(rows, weight, bias, labels[chosen], head)
    return {"loss_sum": loss_sum, "count": chosen.sum().float(), "correct": correct}
