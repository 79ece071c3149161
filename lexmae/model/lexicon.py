"""The lexicon as pure functions: pooling over text tokens, saturation, pruning, pre-training bottleneck.

Everything here is float32: sums over a vocabulary overflow float16 and are coarse in bfloat16.

Shapes: B sequences, L tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lexmae.errors import InputError

LEXICON_SOURCES = ("logits", "saturated")
SOURCES = (*LEXICON_SOURCES, "cls", "off")
_EPS = 1e-8  # beside a variance of 1e-4 or more


def max_pool(logits: Tensor, text_mask: Tensor) -> Tensor:
    """Maximum over text tokens of logits [B, L, V] -> [B, V], float32.

    Of equal maxima one token gets the gradient. A sequence without text tokens gives zeros and no gradient.
    """
    pooled = logits.masked_fill(~text_mask.unsqueeze(-1), float("-inf")).max(dim=1).values
    return pooled.float().masked_fill(~text_mask.any(dim=1, keepdim=True), 0.0)


def saturate(pooled: Tensor) -> Tensor:
    """log(1 + relu(x)), float32, any shape. Monotone, so it may follow the max instead of preceding it."""
    return torch.log1p(torch.relu(pooled.float()))


def importance(pooled: Tensor, source: str = "logits") -> Tensor:
    """Weights a [B, V] that sum to 1 over the vocabulary (SPEC §1).

    `logits`: softmax of the pooled logits. `saturated`: their saturation, normalised; all zeros where
    nothing is positive.
    """
    if source == "logits":
        return torch.softmax(pooled.float(), dim=-1)
    if source == "saturated":
        weights = saturate(pooled)
        return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    raise InputError(f"unknown bottleneck source {source!r}; a lexicon gives {', '.join(LEXICON_SOURCES)}")


def bottleneck(pooled: Tensor, embeddings: Tensor, source: str = "logits", normalize: bool = False) -> Tensor:
    """b = a · sg(E): [B, V] pooled logits and the [V, H] embedding table -> [B, H] float32.

    The gradient flows through the importance weights alone, never into the table. Normalised, b has mean 0 and variance
    1 over its H entries: a LayerNorm without weights, which makes it as long as the embeddings beside which it is read.
    """
    with torch.autocast(pooled.device.type, enabled=False):
        mixed = importance(pooled, source) @ embeddings.detach().float()
        return torch.nn.functional.layer_norm(mixed, mixed.shape[-1:], eps=_EPS) if normalize else mixed


def bag_of_words_loss(pooled: Tensor, ids: Tensor, text_mask: Tensor) -> Tensor:
    """Bag-of-words loss of DupMAE (Xiao et al., RetroMAE-2, ACL 2023), summed over the texts: a float32 scalar.

    What stands in a text is predicted at once from the maximum over its ordinary tokens' logits,

        loss(x) = -1/n · Σ_{v in set(x)} log softmax(pooled)_v

    where set(x) are the different tokens of the n text tokens. Dividing by n is what the authors' published code does.

    Args:
        pooled: [B, V] maximum over text tokens of the logits of the masked text.
        ids: [B, L] the ids before masking.
        text_mask: [B, L], true at text tokens. A text without any has no loss.
    """
    with torch.autocast(pooled.device.type, enabled=False):
        likely = torch.log_softmax(pooled.float(), dim=-1)
        bag = torch.zeros_like(likely).scatter_add(1, ids, text_mask.to(likely.dtype)) > 0  # [B, V]
        n = text_mask.sum(1).clamp_min(1)
        return -(likely.masked_fill(~bag, 0.0).sum(1) / n).sum()


def top_k(values: Tensor, k: int) -> Tensor:
    """Keep the k largest entries of each row of [B, V]; the others become 0. Equal values: any of them."""
    if k < 1:
        raise InputError(f"top-k needs a positive k, not {k}")
    if k >= values.shape[-1]:
        return values
    kept = values.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(values).scatter(-1, kept.indices, kept.values)
