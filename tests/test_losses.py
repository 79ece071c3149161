"""Losses against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lexmae.train import losses


def test_flops_by_hand():
    # means over the batch: (1 + 3)/2, (0 + 0)/2, (2 + 0)/2 → 4 + 0 + 1
    assert losses.flops(torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])).item() == 5.0
    assert losses.flops(torch.zeros(3, 4)).item() == 0


def test_flops_is_that_of_the_whole_batch_and_not_a_mean_of_parts():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert losses.flops(vectors).item() == 0.5
    assert sum(losses.flops(row[None]) for row in vectors).item() / 2 == 1.0


def test_active_terms():
    assert losses.active_terms(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.5]])).item() == 1.5


def naive(queries, docs, n_docs: int, exclude: set, temperature: float) -> tuple[float, float]:
    """One query after the other, in double precision."""
    total, right = 0.0, 0
    for g, query in enumerate(queries.tolist()):
        scores = {column: sum(a * b for a, b in zip(query, doc, strict=True)) / temperature
                  for column, doc in enumerate(docs.tolist()) if (g, column) not in exclude}
        own = scores[g * n_docs]
        highest = max(scores.values())
        total += highest + math.log(sum(math.exp(s - highest) for s in scores.values())) - own
        right += own == highest
    return total / len(queries), right / len(queries)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("exclude", [[], [(0, 4), (1, 0), (1, 1), (2, 3)]])
def test_contrastive_by_a_loop(exclude, temperature):
    generator = torch.Generator().manual_seed(0)
    queries, docs = torch.rand(3, 7, generator=generator), torch.rand(12, 7, generator=generator)
    pairs = torch.tensor(exclude, dtype=torch.int64).reshape(-1, 2).T
    loss, accuracy = losses.contrastive(queries, docs, 4, pairs, temperature)
    expected = naive(queries, docs, 4, set(exclude), temperature)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert accuracy.item() == pytest.approx(expected[1])


def test_an_excluded_document_gets_no_gradient_and_no_rank():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    docs = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0], [0.0, 0.5]], requires_grad=True)
    loss, accuracy = losses.contrastive(queries, docs, 2, torch.tensor([[0, 1], [1, 1]]))
    loss.backward()
    assert accuracy.item() == 1.0 and torch.isfinite(docs.grad).all()
    assert docs.grad[1].tolist() == [0.0, 0.0] and docs.grad[3].abs().sum() > 0


def test_half_precision_is_left_behind():
    queries = torch.full((1, 30000), 2.0, dtype=torch.float16)  # the dot product is 120000, beyond float16
    docs = torch.cat([queries, queries * 0.999])
    loss, _ = losses.contrastive(queries, docs, 2)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert losses.flops(queries * 100).item() == pytest.approx(30000 * 200**2, rel=1e-3)


def test_a_gradient_of_flops_by_hand():
    vectors = torch.tensor([[1.0, 2.0], [3.0, 0.0]], requires_grad=True)
    losses.flops(vectors).backward()  # 2 · mean / B · sign
    assert vectors.grad.tolist() == [[2.0, 1.0], [2.0, 0.0]]
