"""Losses as pure functions; whatever crosses ranks has been gathered before.

Shapes: G queries of the global batch, N documents per query, V vocabulary. All arithmetic is in float32: dot products
over a vocabulary overflow half precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def contrastive(queries: torch.Tensor, docs: torch.Tensor, n_docs: int, exclude: torch.Tensor | None = None,
                temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each query over every document of the global batch (SPEC §3).

    Args:
        queries: [G, V].
        docs: [G·N, V]; row ``g·N`` is the positive of query ``g``.
        exclude: int64 [2, E], (query, document) pairs left out of the sum.

    Returns:
        mean loss, and the share of queries whose positive scores highest.
    """
    scores = queries.float() @ docs.float().T / temperature  # [G, G·N]
    if exclude is not None and exclude.numel():
        scores = scores.index_put((exclude[0], exclude[1]), scores.new_tensor(float("-inf")))
    target = torch.arange(len(queries), device=queries.device) * n_docs
    return F.cross_entropy(scores, target), (scores.argmax(1) == target).float().mean()


def listwise(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each query over its own documents, of which the first is the positive.

    Args:
        scores: [Q, N].

    Returns:
        the sum over the queries, and how many of them score their positive above every negative: a tie is no success,
        so that a model of equal scores has none.
    """
    scores = scores.float()
    target = scores.new_zeros(len(scores), dtype=torch.long)
    won = scores[:, :1] > scores[:, 1:]  # [Q, N - 1]
    return F.cross_entropy(scores, target, reduction="sum"), won.all(1).sum()


def flops(vectors: torch.Tensor) -> torch.Tensor:
    """FLOPS regulariser Σ_v (mean_b |x_bv|)² of vectors [B, V] (Paria et al. 2020); B is the global batch."""
    return vectors.float().abs().mean(0).square().sum()


def active_terms(vectors: torch.Tensor) -> torch.Tensor:
    """Mean number of non-zero entries of vectors [B, V]."""
    return (vectors > 0).float().sum(1).mean()
