"""A start for the LM head of a backbone that comes without one, such as a sentence encoder: fitted, not random.

The head of a masked language model is a transform (dense, activation, LayerNorm) in front of the output matrix. Some
published backbones have lost theirs. A random transform gives noise, which costs thousands of steps before the
vectors mean anything. The last hidden state of a token still tells which token it is, and the output matrix is
the word embeddings, which every backbone has. So the dense layer starts as the affine map that takes hidden states
closest, in the sense of least squares, to the centred output embedding of their own token: ridge regression on a few
hundred texts, in seconds. What it cannot tell apart lies near in the embeddings, that is, the vectors expand from
the beginning.

The bias of the output starts at minus the mean logit that `_NAMED` entries of a token's vocabulary exceed, so that
relu leaves each token about that many.

Shapes: B sequences, L tokens, H hidden size, V vocabulary, N text tokens of all the texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.lexical_start import LINEAR_SHIFT

TEXTS = 384
"""Texts that suffice: some 30,000 tokens for a few hundred unknowns in each dimension."""

_NAMED = 32
_RIDGE = 1e-3  # of the mean square of a hidden unit


@torch.no_grad()
def fit_transform(lm: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Overwrite the transform of the LM head and the output bias, in place.

    Args:
        lm: the backbone; its layers and embeddings are left as they are.
        batches: texts as arguments of `SparseEncoder.forward`, [B, L] each; the last one also sets the bias.

    Returns:
        The share of the last batch's text tokens whose own entry has the largest logit.

    Raises:
        InputError: there is no text token to fit to.
    """
    was_training = lm.training
    lm.eval()
    weight, bias = backbone.output_matrix(lm)
    embeddings = weight - weight.mean(0)  # what all entries share tells none apart
    width = weight.shape[1]
    gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    moment = torch.zeros(width + 1, width, dtype=torch.float64)
    hidden = ids = None
    for batch in batches:
        hidden, ids = _text_tokens(lm, batch)
        rows = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1).double()
        gram += (rows.T @ rows).cpu()
        moment += (rows.T @ embeddings[ids].double()).cpu()
    if hidden is None or gram[-1, -1] == 0:
        raise InputError("has no LM head, and there is no text to fit one to")
    penalty = _RIDGE * gram.diag()[:-1].mean() * torch.eye(width + 1, dtype=torch.float64)
    penalty[-1, -1] = 0
    solved = torch.linalg.solve(gram + penalty, moment).to(hidden.device)
    solved /= (hidden.double() @ solved[:-1] + solved[-1]).std().clamp_min(1e-12)
    dense, norm = backbone.head_layers(lm)
    dense.weight.copy_(solved[:-1].T)
    if dense.bias is not None:
        dense.bias.copy_(solved[-1] + LINEAR_SHIFT)
    norm.weight.fill_(1.0)
    if norm.bias is not None:
        norm.bias.zero_()
    logits = backbone.transform(lm, hidden) @ weight.T
    if bias is not None:
        bias.fill_(-logits.topk(min(_NAMED, logits.shape[1]), dim=1).values[:, -1].mean())
    lm.train(was_training)
    return (logits.argmax(1) == ids).float().mean().item()


def _text_tokens(lm: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Last hidden states [N, H] and ids [N] of the text tokens of a batch."""
    device = backbone.word_embeddings(lm).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    hidden = backbone.hidden_states(lm, batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
    text = batch["text_mask"].bool()
    return hidden[text].float(), batch["input_ids"][text]
