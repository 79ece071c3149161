"""Losses against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lexmae.train import losses


def regularise(name: str, vectors: torch.Tensor, **options) -> torch.Tensor:
    """A regulariser of vectors [B, V]."""
    vectors = vectors.float()
    return losses.REGULARISERS[name](losses.column_means(vectors), vectors, **options)


def test_flops_by_hand():
    # means over the batch: (1 + 3)/2, (0 + 0)/2, (2 + 0)/2 → 4 + 0 + 1
    assert regularise("flops", torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])).item() == 5.0
    assert regularise("flops", torch.zeros(3, 4)).item() == 0


def test_flops_is_that_of_the_whole_batch_and_not_a_mean_of_parts():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert regularise("flops", vectors).item() == 0.5
    assert sum(regularise("flops", row[None]) for row in vectors).item() / 2 == 1.0


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
    loss, accuracy = losses.contrastive(queries @ docs.T, 4, pairs, temperature)
    expected = naive(queries, docs, 4, set(exclude), temperature)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert accuracy.item() == pytest.approx(expected[1])


def test_an_excluded_document_gets_no_gradient_and_no_rank():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    docs = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0], [0.0, 0.5]], requires_grad=True)
    loss, accuracy = losses.contrastive(queries @ docs.T, 2, torch.tensor([[0, 1], [1, 1]]))
    loss.backward()
    assert accuracy.item() == 1.0 and torch.isfinite(docs.grad).all()
    assert docs.grad[1].tolist() == [0.0, 0.0] and docs.grad[3].abs().sum() > 0


def test_half_precision_is_left_behind():
    queries = torch.full((1, 30000), 2.0, dtype=torch.float16)  # the dot product is 120000, beyond float16
    docs = torch.cat([queries, queries * 0.999])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, *_ = losses.scores_and_means(queries, docs)
    assert scores.dtype == torch.float32 and scores[0, 0] == 120000
    loss, _ = losses.contrastive(scores, 2)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert regularise("flops", queries * 100).item() == pytest.approx(30000 * 200**2, rel=1e-3)


@pytest.mark.parametrize("rows", [1, 64, 150])  # columns are summed in blocks of 64 rows
def test_scores_and_means_are_the_plain_ones_with_their_gradients(rows):
    generator = torch.Generator().manual_seed(1)
    queries, docs = (torch.randn(n, 9, generator=generator).relu().requires_grad_() for n in (3, rows))
    weights = torch.randn(3, rows, generator=generator)

    def value(scores, query_means, doc_means):
        return (scores * weights).sum() + 2 * query_means.square().sum() + 3 * doc_means.square().sum()

    plain = queries @ docs.T, queries.abs().mean(0), docs.abs().mean(0)
    found = losses.scores_and_means(queries, docs)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)
    expected = torch.autograd.grad(value(*plain), (queries, docs))
    for one, other in zip(torch.autograd.grad(value(*found), (queries, docs)), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_scores_of_ones_own_documents():
    scores = torch.arange(12.0).view(2, 6)
    assert losses.own_scores(scores, 3).tolist() == [[0.0, 1.0, 2.0], [9.0, 10.0, 11.0]]


def test_kl_by_hand():
    # teacher (ln 3, 0) is (3/4, 1/4), student (0, 0) is (1/2, 1/2): 3/4·ln(3/2) + 1/4·ln(1/2); the second row agrees
    student, teacher = torch.zeros(2, 2), torch.tensor([[math.log(3), 0.0], [5.0, 5.0]])
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert losses.distribution_gap(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert losses.distribution_gap(student, 2 * teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert losses.distribution_gap(teacher + 7, teacher).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_torchs(temperature):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (10 * torch.randn(5, 4, generator=generator) for _ in range(2))
    expected = F.kl_div((student / temperature).softmax(1).log(), (teacher / temperature).softmax(1),
                        reduction="batchmean")
    assert losses.distribution_gap(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_gradient_of_kl_is_the_difference_of_the_distributions():
    student, teacher = torch.tensor([[1.0, 2.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 3.0, 1.0]])
    losses.distribution_gap(student, teacher).backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(1) - teacher.softmax(1))


def test_margin_mse_by_hand():
    # distances 3 − 1 = 2 and 3 − 2 = 1 against 5 − 4 = 1 and 5 − 1 = 4; then 0 and 0 against 2 and 0
    student = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    teacher = torch.tensor([[5.0, 4.0, 1.0], [0.0, -2.0, 0.0]])
    assert losses.margin_gap(student, teacher).item() == pytest.approx((1 + 9 + 4 + 0) / 4)
    assert losses.margin_gap(student + 9, student).item() == pytest.approx(0)


def test_a_gradient_of_flops_by_hand():
    vectors = torch.tensor([[1.0, 2.0], [3.0, 0.0]], requires_grad=True)
    regularise("flops", vectors).backward()  # 2 · mean / B · sign
    assert vectors.grad.tolist() == [[2.0, 1.0], [2.0, 0.0]]


# ------------------------------------------------------------------------------------------------- sparsity


VECTORS = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])


def test_regularisers_by_hand():
    assert regularise("flops", VECTORS).item() == pytest.approx(2.0**2 + 1.0**2)
    assert regularise("l1", VECTORS).item() == pytest.approx((3 + 3) / 2)
    assert regularise("none", VECTORS).item() == 0
    # shares of 1 and 1/2 of the texts: d^(log_0.1 2) is 1 and 0.5^(-0.30103) = 1.2320
    weights = [1.0, 1 / (1 + (0.5 ** (math.log(2) / math.log(0.1)) - 1) ** 10)]
    expected = (weights[0] * 2) ** 2 + (weights[1] * 1) ** 2
    assert regularise("df_flops", VECTORS).item() == pytest.approx(expected, rel=1e-6)
    assert losses.active_terms(VECTORS).item() == 1.5


def test_the_weight_of_a_frequent_term_is_one_half_at_alpha():
    vectors = torch.zeros(10, 2)
    vectors[:1, 0], vectors[:, 1] = 1.0, 0.0
    assert regularise("df_flops", vectors, alpha=0.1).item() == pytest.approx((0.5 * 0.1) ** 2, rel=1e-5)
    rare = torch.zeros(1000, 1)
    rare[0] = 1.0
    assert regularise("df_flops", rare).item() < 1e-12 < regularise("flops", rare).item(), "rare terms are free"


@pytest.mark.parametrize("name", losses.REGULARISERS)
def test_gradients_of_regularisers(name):
    vectors = (torch.rand(4, 6, dtype=torch.float64) + 0.1).requires_grad_()
    if name == "none":
        assert not regularise("none", vectors).requires_grad
    else:
        found = torch.autograd.grad(regularise(name, vectors.float()), vectors)[0]
        for at in ((0, 0), (3, 5)):
            shifted = [vectors.detach().clone() for _ in range(2)]
            shifted[0][at] += 1e-3
            shifted[1][at] -= 1e-3
            high, low = (regularise(name, v.float()).item() for v in shifted)
            assert found[at].item() == pytest.approx((high - low) / 2e-3, rel=2e-2)
