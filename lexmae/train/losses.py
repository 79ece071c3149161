"""Losses as pure functions; whatever crosses ranks has been gathered before.

Shapes: G queries of the global batch, N documents per query, V vocabulary. All arithmetic is in float32: dot products
over a vocabulary overflow half precision.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_BLOCK = 64  # rows whose copies exist at a time


def scores_and_means(queries: torch.Tensor, docs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All that the losses need of the vectors, which may be gigabytes: queries [G, V], docs [D, V].

    Returns:
        scores [G, D], and the column means of |queries| and of |docs|, both [V]; float32. Beside the vectors
        themselves, the backward pass holds one gradient of their size and no copy.
    """
    with torch.autocast(queries.device.type, enabled=False):
        return _ScoresAndMeans.apply(queries.float(), docs.float())


class _ScoresAndMeans(torch.autograd.Function):
    """Autograd alone makes a tensor of the vectors' size for each use of them, and another for each sum of two."""

    @staticmethod
    def forward(ctx, queries: torch.Tensor, docs: torch.Tensor):
        ctx.save_for_backward(queries, docs)
        return queries @ docs.T, column_means(queries), column_means(docs)

    @staticmethod
    def backward(ctx, d_scores: torch.Tensor, *d_means: torch.Tensor):
        queries, docs = ctx.saved_tensors
        gradients = d_scores @ docs, d_scores.T @ queries
        for gradient, vectors, d_mean in zip(gradients, (queries, docs), d_means, strict=True):
            for part, rows in zip(gradient.split(_BLOCK), vectors.split(_BLOCK), strict=True):
                part.addcmul_(rows.sign(), d_mean, value=1 / len(vectors))
        return gradients


def contrastive(scores: torch.Tensor, n_docs: int, exclude: torch.Tensor | None = None,
                temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each query over every document of the global batch (SPEC §3).

    Args:
        scores: [G, G·N]; column ``g·N`` is the positive of query ``g``.
        exclude: int64 [2, E], (query, document) pairs left out of the sum.

    Returns:
        mean loss, and the share of queries whose positive scores highest.
    """
    scores = scores.float() / temperature
    if exclude is not None and exclude.numel():
        scores = scores.index_put((exclude[0], exclude[1]), scores.new_tensor(float("-inf")))
    target = torch.arange(len(scores), device=scores.device) * n_docs
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


def own_scores(scores: torch.Tensor, n_docs: int) -> torch.Tensor:
    """Those of each query's own N documents, [G, N], among all scores [G, G·N]."""
    return scores.view(len(scores), -1, n_docs).diagonal(dim1=0, dim2=1).T


def distribution_gap(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(softmax(teacher / τ) ‖ softmax(student / τ)) of scores [G, N] over N, mean over G (SPEC §3 with τ = 1)."""
    student, teacher = (F.log_softmax(scores.float() / temperature, dim=1) for scores in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def margin_gap(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Margin-MSE (Hofstätter et al. 2020, arXiv 2010.02666) of scores [G, N], column 0 the positive: mean square over
    all negatives of the difference between the student's and the teacher's distance from positive to negative."""
    student, teacher = (scores[:, :1].float() - scores[:, 1:].float() for scores in (student, teacher))
    return F.mse_loss(student, teacher)


def flops(means: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """FLOPS regulariser Σ_v (mean_b |x_bv|)² (Paria et al. 2020); b runs over the global batch."""
    return means.square().sum()


def l1(means: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """mean_b Σ_v |x_bv|."""
    return means.sum()


def df_flops(means: torch.Tensor, vectors: torch.Tensor, alpha: float = 0.1, beta: float = 10.0) -> torch.Tensor:
    """FLOPS in which a term weighs the more, the more documents have it: Σ_v (w_v · mean_b |x_bv|)².

    ``w = 1 / (1 + (d^(log_α 2) − 1)^β)``, a curve that rises from 0 to 1 with w = ½ where a share d = α of the texts
    has the term (DF-FLOPS, Porco et al. 2025, "An Alternative FLOPS Regularization to Effectively Productionize
    SPLADE-Doc"). Shares are those of the global batch, without a gradient.
    """
    shares = column_shares(vectors)
    weight = 1 / (1 + (shares.clamp_min(1e-9) ** (math.log(2) / math.log(alpha)) - 1) ** beta)
    return (weight * means).square().sum()


def none(means: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """No regulariser: 0."""
    return means.new_zeros(())


REGULARISERS = {"flops": flops, "l1": l1, "df_flops": df_flops, "none": none}
"""By the names of recipes: column means [V] of |vectors|, and the vectors [B, V] themselves → scalar."""


def column_means(vectors: torch.Tensor) -> torch.Tensor:
    """mean_b |x_bv| of vectors [B, V], [V]."""
    return torch.stack([rows.abs().sum(0) for rows in vectors.split(_BLOCK)]).sum(0) / len(vectors)


def column_shares(vectors: torch.Tensor) -> torch.Tensor:
    """Share of the rows of [B, V] in which each column is not zero, [V], without a gradient."""
    return torch.stack([(rows.detach() != 0).sum(0) for rows in vectors.split(_BLOCK)]).sum(0) / len(vectors)


def active_terms(vectors: torch.Tensor) -> torch.Tensor:
    """Mean number of non-zero entries of vectors [B, V]."""
    return sum(rows.count_nonzero() for rows in vectors.split(_BLOCK)) / len(vectors)
