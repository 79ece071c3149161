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


# ------------------------------------------------------------------------------------- distillation and sparsity


def test_own_scores_are_the_diagonal_blocks():
    queries, docs = torch.rand(3, 7), torch.rand(12, 7)
    expected = torch.stack([docs[4 * i:4 * i + 4] @ queries[i] for i in range(3)])
    torch.testing.assert_close(losses.own_scores(queries, docs, 4), expected)


def test_kl_by_hand():
    # teacher (ln 3, 0) is (3/4, 1/4), student (0, 0) is (1/2, 1/2): 3/4·ln(3/2) + 1/4·ln(1/2)
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert losses.kl(student, teacher).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    same = torch.randn(4, 5)
    assert losses.kl(same + 3, same).item() == pytest.approx(0.0, abs=1e-6), "a constant changes no distribution"
    assert losses.kl(2 * student, 2 * teacher, 2.0).item() == pytest.approx(losses.kl(student, teacher).item())


def test_kl_is_the_mean_over_queries():
    teacher, student = torch.randn(3, 5), torch.randn(3, 5)
    rows = [sum(p * (math.log(p) - math.log(q)) for p, q in zip(t, s, strict=True))
            for t, s in zip(teacher.softmax(1).tolist(), student.softmax(1).tolist(), strict=True)]
    assert losses.kl(student, teacher).item() == pytest.approx(sum(rows) / 3, rel=1e-5)


def test_margin_mse_by_hand():
    student = torch.tensor([[5.0, 3.0, 1.0], [2.0, 2.0, 4.0]])  # margins 2, 4; 0, -2
    teacher = torch.tensor([[10.0, 9.0, 4.0], [1.0, 0.0, -1.0]])  # margins 1, 6; 1, 2
    assert losses.margin_mse(student, teacher).item() == pytest.approx((1 + 4 + 1 + 16) / 4)
    assert losses.margin_mse(torch.ones(2, 1), torch.ones(2, 1)).item() == 0, "no negatives, no margins"


VECTORS = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])


def test_regularisers_by_hand():
    assert losses.flops(VECTORS).item() == pytest.approx(2.0**2 + 1.0**2)
    assert losses.l1(VECTORS).item() == pytest.approx((3 + 3) / 2)
    assert losses.none(VECTORS).item() == 0
    # shares of 1 and 1/2 of the texts: d^(log_0.1 2) is 1 and 0.5^(-0.30103) = 1.2320
    weights = [1.0, 1 / (1 + (0.5 ** (math.log(2) / math.log(0.1)) - 1) ** 10)]
    assert losses.df_flops(VECTORS).item() == pytest.approx((weights[0] * 2) ** 2 + (weights[1] * 1) ** 2, rel=1e-6)
    assert losses.active_terms(VECTORS).item() == 1.5


def test_the_weight_of_a_frequent_term_is_one_half_at_alpha():
    vectors = torch.zeros(10, 2)
    vectors[:1, 0], vectors[:, 1] = 1.0, 0.0
    assert losses.df_flops(vectors, alpha=0.1).item() == pytest.approx((0.5 * 0.1) ** 2, rel=1e-5)
    rare = torch.zeros(1000, 1)
    rare[0] = 1.0
    assert losses.df_flops(rare).item() < 1e-12 < losses.flops(rare).item(), "rare terms are free"


@pytest.mark.parametrize("name", losses.REGULARISERS)
def test_gradients_of_regularisers(name):
    vectors = (torch.rand(4, 6, dtype=torch.float64) + 0.1).requires_grad_()
    if name == "none":
        assert not losses.none(vectors).requires_grad
    else:
        found = torch.autograd.grad(losses.REGULARISERS[name](vectors.float()), vectors)[0]
        for at in ((0, 0), (3, 5)):
            shifted = [vectors.detach().clone() for _ in range(2)]
            shifted[0][at] += 1e-3
            shifted[1][at] -= 1e-3
            high, low = (losses.REGULARISERS[name](v.float()).item() for v in shifted)
            assert found[at].item() == pytest.approx((high - low) / 2e-3, rel=2e-2)
