from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lexmae.errors import InputError
from lexmae.model import mlm
from lexmae.model.mlm import cross_entropy_sum


def inputs(rows=11, vocabulary=17, width=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return [draw(rows, width), draw(vocabulary, width), draw(vocabulary)], targets


@pytest.fixture(params=["reference", "chunked"])
def implementation(request):
    return request.param


@pytest.fixture(params=[256, 3, 1], ids=["one chunk", "chunks of 3", "single rows"])
def chunks(request, monkeypatch):
    monkeypatch.setitem(mlm.ROWS, "cpu", request.param)


def test_loss_gradients_and_hits(implementation, chunks):
    leaves, targets = inputs()
    probability = torch.softmax(leaves[0] @ leaves[1].T + leaves[2], -1)
    expected = -probability[torch.arange(11), targets].log().sum()
    wanted = torch.autograd.grad(3.0 * expected, leaves)
    loss, correct = cross_entropy_sum(*leaves, targets, implementation)
    torch.testing.assert_close(loss, expected)
    assert correct == (probability.argmax(-1) == targets).sum() and not correct.requires_grad
    for got, want in zip(torch.autograd.grad(3.0 * loss, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("most", "expected"), [(3 * 17, [3, 3, 3, 2]), (5, [1] * 11), (1 << 27, [11])])
def test_a_large_vocabulary_has_fewer_rows_at_a_time(most, expected, monkeypatch):
    chunks, plain = [], mlm._to_gradient
    monkeypatch.setattr(mlm, "_to_gradient", lambda logits, target: chunks.append(len(logits)) or plain(logits, target))
    monkeypatch.setattr(mlm, "_LOGITS", most)
    leaves, targets = inputs()
    cross_entropy_sum(*leaves, targets, "chunked")
    assert chunks == expected


def test_gradcheck(chunks):
    leaves, targets = inputs(rows=4, vocabulary=5, width=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: cross_entropy_sum(*x, targets, "chunked")[0], leaves)


def test_large_logits_stay_finite(implementation):
    leaves, targets = inputs()
    big = [leaves[0].detach() * 1e4, leaves[1].detach(), leaves[2].detach()]
    expected = F.cross_entropy(F.linear(*big).double(), targets, reduction="sum").float()
    torch.testing.assert_close(cross_entropy_sum(*big, targets, implementation)[0], expected)


def test_no_rows(implementation):
    leaves, targets = inputs()
    loss, correct = cross_entropy_sum(leaves[0][:0], *leaves[1:], targets[:0], implementation)
    loss.backward()
    assert loss == correct == 0 and all(leaf.grad.eq(0).all() for leaf in leaves)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_wanted_gradients(frozen):
    leaves, targets = inputs()
    leaves[frozen].requires_grad_(False)
    cross_entropy_sum(*leaves, targets, "chunked")[0].backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


def test_without_bias(implementation):
    (rows, weight, _), targets = inputs()
    loss, _ = cross_entropy_sum(rows, weight, None, targets, implementation)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(rows, weight), targets, reduction="sum"))
    loss.backward()
    assert rows.grad is not None and weight.grad is not None


def test_without_gradients_none_are_made(monkeypatch):
    leaves, targets = inputs()
    monkeypatch.setattr(mlm, "_accumulate", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        loss, _ = cross_entropy_sum(*leaves, targets, "chunked")
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(*leaves), targets, reduction="sum").detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(implementation, chunks, dtype):
    leaves, targets = inputs()
    expected, _ = cross_entropy_sum(*leaves, targets, "reference")
    wanted = torch.autograd.grad(expected, leaves)
    with torch.autocast("cpu", dtype=dtype):
        loss, correct = cross_entropy_sum(*leaves, targets, implementation)
    assert loss.dtype == correct.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    for got, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_half_precision_with_a_loss_scale():
    leaves, targets = inputs(dtype=torch.float16)
    loss, _ = cross_entropy_sum(*leaves, targets, "chunked")
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = torch.autograd.grad(cross_entropy_sum(*exact, targets, "reference")[0] * 512, exact)
    for got, want in zip(torch.autograd.grad(loss * 512, leaves), wanted, strict=True):
        assert got.dtype == torch.float16
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=5.0)


def test_unknown_implementation():
    leaves, targets = inputs()
    with pytest.raises(InputError, match="chunked"):
        cross_entropy_sum(*leaves, targets, "fast")
