"""Losses as pure functions; whatever crosses ranks has been gathered before.

Shapes: G queries of the global batch, N documents per query, V vocabulary. All arithmetic is in float32: dot products
over a vocabulary overflow half precision.
"""

from __future__ import annotations

import math

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


def own_scores(queries: torch.Tensor, docs: torch.Tensor, n_docs: int) -> torch.Tensor:
    """Scores [G, N] of each query's own documents; queries [G, V], docs [G·N, V]."""
    return torch.einsum("gv,gnv->gn", queries.float(), docs.float().view(len(queries), n_docs, -1))


def kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) over each query's own documents, mean over the queries (SPEC §3).

    Args:
        student, teacher: scores [G, N].
        temperature: divides both.
    """
    target = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(F.log_softmax(student.float() / temperature, dim=1), target, reduction="batchmean", log_target=True)


def margin_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the margins between the positive, document 0, and each negative (Hofstätter et al.
    2020); scores [G, N]."""
    own, wanted = student[:, :1] - student[:, 1:], teacher[:, :1] - teacher[:, 1:]
    return F.mse_loss(own.float(), wanted.float()) if own.numel() else student.sum() * 0.0


def flops(vectors: torch.Tensor) -> torch.Tensor:
    """FLOPS regulariser Σ_v (mean_b |x_bv|)² of vectors [B, V] (Paria et al. 2020); B is the global batch."""
    return _means(vectors).square().sum()


def l1(vectors: torch.Tensor) -> torch.Tensor:
    """mean_b Σ_v |x_bv| of vectors [B, V]."""
    return _means(vectors).sum()


def df_flops(vectors: torch.Tensor, alpha: float = 0.1, beta: float = 10.0) -> torch.Tensor:
    """FLOPS in which a term weighs the more, the more documents have it: Σ_v (w_v · mean_b |x_bv|)² of vectors [B, V].

    ``w = 1 / (1 + (d^(log_α 2) − 1)^β)``, a curve that rises from 0 to 1 with w = ½ where a share d = α of the texts
    has the term (DF-FLOPS, Porco et al. 2025, "An Alternative FLOPS Regularization to Effectively Productionize
    SPLADE-Doc"). Shares are those of the global batch, without a gradient.
    """
    share = (vectors > 0).float().mean(0)
    weight = 1 / (1 + (share.clamp_min(1e-9) ** (math.log(2) / math.log(alpha)) - 1) ** beta)
    return (weight * _means(vectors)).square().sum()


def none(vectors: torch.Tensor) -> torch.Tensor:
    """No regulariser: 0."""
    return vectors.new_zeros((), dtype=torch.float32)


REGULARISERS = {"flops": flops, "l1": l1, "df_flops": df_flops, "none": none}
"""By the names of recipes: vectors [B, V] of the global batch → scalar."""


def _means(vectors: torch.Tensor) -> torch.Tensor:
    """mean_b |x_bv|, [V], without a copy of the vectors."""
    return torch.linalg.vector_norm(vectors.float(), ord=1, dim=0) / len(vectors)


def active_terms(vectors: torch.Tensor) -> torch.Tensor:
    """Mean number of non-zero entries of vectors [B, V]."""
    return (vectors > 0).sum().float() / len(vectors)
