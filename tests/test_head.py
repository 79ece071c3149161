from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lexmae.errors import InputError
from lexmae.model import head
from lexmae.model.head import max_logits


def inputs(batch=4, length=7, vocabulary=33, width=5, dtype=torch.float32, seed=0, text=0.6):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(batch, length, generator=generator) < text
    mask[:, 1] = True
    return [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()], mask


def by_hand(hidden, weight, bias, mask, grad):
    """Value and gradients in float64 numpy, one (sequence, entry) at a time."""
    h, w, b, g = (x.detach().double().numpy() for x in (hidden, weight, bias, grad))
    value = np.zeros((h.shape[0], w.shape[0]))
    dh, dw, db = np.zeros_like(h), np.zeros_like(w), np.zeros_like(b)
    for s in range(h.shape[0]):
        text = [t for t in range(h.shape[1]) if mask[s, t]]
        for v in range(w.shape[0]):
            if not text:
                continue
            scores = [h[s, t] @ w[v] + b[v] for t in text]
            best = text[int(np.argmax(scores))]
            value[s, v] = max(scores)
            dh[s, best] += g[s, v] * w[v]
            dw[v] += g[s, v] * h[s, best]
            db[v] += g[s, v]
    return value, dh, dw, db


@pytest.fixture(params=["reference", "chunked"])
def implementation(request):
    return request.param


@pytest.fixture(params=[(1024, 512), (8, 10), (1, 1)], ids=["one tile", "tiles", "smallest tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setitem(head.TILES, "cpu", request.param)


def gradient(shape, share=1.0):
    generator = torch.Generator().manual_seed(9)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < share)


@pytest.mark.parametrize("share", [1.0, 0.1, 0.0], ids=["dense", "sparse", "zero"])
def test_values_and_gradients(implementation, tiles, share):
    leaves, mask = inputs()
    mask[2] = False  # a sequence without text
    grad = gradient((4, 33), share)
    value, *expected = by_hand(*leaves, mask, grad)
    pooled = max_logits(*leaves, mask, implementation)
    assert pooled.dtype == torch.float32
    np.testing.assert_allclose(pooled.detach().numpy(), value, atol=1e-5)
    for got, want in zip(torch.autograd.grad(pooled, leaves, grad), expected, strict=True):
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), want, atol=1e-5)


def test_forms_are_equal_in_float32():
    leaves, mask = inputs(batch=5, length=40, vocabulary=700, width=24, text=0.8)
    grad = gradient((5, 700), 0.3)
    results = []
    for form in ("reference", "chunked"):
        pooled = max_logits(*leaves, mask, form)
        results.append([pooled, *torch.autograd.grad(pooled, leaves, grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_gradcheck(tiles):
    leaves, mask = inputs(batch=3, length=4, vocabulary=6, width=3, dtype=torch.float64)
    assert max_logits(*leaves, mask, "chunked").dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *x: max_logits(*x, mask, "chunked"), leaves)


def test_without_bias(implementation):
    (hidden, weight, _), mask = inputs()
    pooled = max_logits(hidden, weight, None, mask, implementation)
    expected = max_logits(hidden, weight, torch.zeros(33), mask, implementation)
    torch.testing.assert_close(pooled, expected)
    pooled.sum().backward()
    assert hidden.grad is not None and weight.grad is not None


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_wanted_gradients(frozen):
    leaves, mask = inputs()
    leaves[frozen].requires_grad_(False)
    max_logits(*leaves, mask, "chunked").sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


def test_without_gradients_it_saves_nothing(monkeypatch):
    leaves, mask = inputs()
    expected = max_logits(*leaves, mask, "chunked")
    asked = []
    original = head._max_of_tile
    monkeypatch.setattr(head, "_max_of_tile", lambda x, best, where: asked.append(where) or original(x, best, where))
    with torch.no_grad():
        got = max_logits(*leaves, mask, "chunked")
    assert asked == [None] and not got.requires_grad
    torch.testing.assert_close(got, expected)


def test_equal_maxima_give_one_token_the_gradient(implementation):
    hidden = torch.ones(1, 3, 2, requires_grad=True)
    max_logits(hidden, torch.ones(1, 2), None, torch.ones(1, 3).bool(), implementation).sum().backward()
    assert sorted(hidden.grad[0, :, 0].tolist()) == [0.0, 0.0, 1.0]


def test_no_text_anywhere(implementation):
    leaves, mask = inputs()
    pooled = max_logits(*leaves, torch.zeros_like(mask), implementation)
    pooled.sum().backward()
    assert pooled.eq(0).all() and all(leaf.grad.eq(0).all() for leaf in leaves)


def test_integer_masks_are_taken(implementation):
    leaves, mask = inputs()
    expected = max_logits(*leaves, mask, implementation)
    torch.testing.assert_close(max_logits(*leaves, mask.long(), implementation), expected)


def test_logits_outside_the_text_are_never_seen(implementation):
    (hidden, weight, bias), mask = inputs()
    mask[0] = False
    spoiled = hidden.detach().masked_fill(~mask.unsqueeze(-1), float("nan"))
    got = max_logits(spoiled, weight, bias, mask, implementation)
    expected = max_logits(hidden, weight, bias, mask, implementation)
    torch.testing.assert_close(got, expected)


def test_nan_shows(implementation):
    (hidden, weight, bias), mask = inputs()
    broken = hidden.detach().clone()
    broken[1, 1] = float("nan")
    pooled = max_logits(broken.requires_grad_(), weight, bias, mask, implementation)
    assert pooled[1].isnan().all() and pooled[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(implementation, dtype):
    leaves, mask = inputs(batch=3, length=9, vocabulary=50, width=16)
    grad = gradient((3, 50))
    exact = max_logits(*leaves, mask, "reference")
    wanted = torch.autograd.grad(exact, leaves, grad)
    with torch.autocast("cpu", dtype=dtype):
        pooled = max_logits(*leaves, mask, implementation)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, exact, atol=0.1, rtol=0.02)
    for got, want in zip(torch.autograd.grad(pooled, leaves, grad), wanted, strict=True):
        assert got.dtype == torch.float32
        assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.97


def test_autocast_computes_in_its_type():
    leaves, mask = inputs(width=64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = max_logits(*leaves[:2], None, mask, "chunked")
    low = F.linear(leaves[0].bfloat16(), leaves[1].bfloat16()).float()
    expected = low.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(1)
    torch.testing.assert_close(chunked, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype):
    leaves, mask = inputs(dtype=dtype)
    pooled = max_logits(*leaves, mask, "chunked")
    assert pooled.dtype == torch.float32
    gradients = torch.autograd.grad(pooled, leaves, gradient((4, 33)))
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients)


def test_it_is_deterministic():
    leaves, mask = inputs(batch=6, length=20, vocabulary=300, width=8)
    grad = gradient((6, 300))
    runs = [torch.autograd.grad(max_logits(*leaves, mask, "chunked"), leaves, grad) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_logits_of_all_tokens_are_never_made(monkeypatch):
    monkeypatch.setitem(head.TILES, "cpu", (8, 10))
    leaves, mask = inputs(batch=6, length=8, vocabulary=45)
    largest = []
    original = head._max_of_tile
    monkeypatch.setattr(head, "_max_of_tile", lambda x, *rest: largest.append(x.numel()) or original(x, *rest))
    max_logits(*leaves, mask, "chunked")
    assert max(largest) <= 8 * 10


def test_unknown_implementation():
    leaves, mask = inputs()
    with pytest.raises(InputError, match="chunked"):
        max_logits(*leaves, mask, "fast")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    leaves, mask = inputs(batch=5, length=30, vocabulary=500, width=32)
    grad = gradient((5, 500), 0.3)
    cpu = max_logits(*leaves, mask, "chunked")
    wanted = [cpu, *torch.autograd.grad(cpu, leaves, grad)]
    moved = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
    gpu = max_logits(*moved, mask.cuda(), "chunked")
    for got, want in zip([gpu, *torch.autograd.grad(gpu, moved, grad.cuda())], wanted, strict=True):
        torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=1e-4)
