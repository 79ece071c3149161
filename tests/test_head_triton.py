"""The Triton form of the head against one entry at a time in float64: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch
from test_head import by_hand, gradient, inputs

from lexmae.errors import InputError
from lexmae.model import head
from lexmae.model.head import max_logits
from lexmae.model.packing import Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernel is defined

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}  # inputs are exact, sums in float32


def on_device(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [leaf.detach().to(DEVICE).requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch, length, vocabulary, width, share", [
    (4, 7, 33, 5, 0.4), (3, 70, 130, 65, 0.1), (1, 1, 1, 1, 1.0), (2, 129, 300, 40, 0.0), (5, 16, 128, 64, 1.0)])
def test_values_and_gradients(batch, length, vocabulary, width, share, dtype):
    leaves, mask = inputs(batch, max(2, length), vocabulary, width, dtype)
    if batch > 2:
        mask[2] = False  # a sequence without text
    grad = gradient((batch, vocabulary), share)
    value, *expected = by_hand(*leaves, mask, grad)
    moved = on_device(leaves)
    pooled = max_logits(*moved, mask.to(DEVICE), "triton")
    assert pooled.dtype == torch.float32
    np.testing.assert_allclose(pooled.detach().cpu().numpy(), value, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    loose = 1e-5 if dtype == torch.float32 else 0.02  # gradients are rounded to the type
    for got, want in zip(torch.autograd.grad(pooled, moved, grad.to(DEVICE)), expected, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.float().cpu().numpy(), want, atol=loose, rtol=loose)


def test_packed_rows():
    leaves, mask = inputs(4, 20, 140, 12)
    lengths = torch.tensor([20, 3, 11, 7])
    tokens = torch.arange(20) < lengths[:, None]
    mask, packing = mask & tokens, Packing.of(tokens.to(DEVICE))
    moved = on_device(leaves)
    expected = max_logits(*moved, mask.to(DEVICE), "reference")
    got = max_logits(packing.pack(moved[0]), *moved[1:], mask.to(DEVICE), "triton", packing)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    grad = gradient((4, 140), 0.3).to(DEVICE)
    for one, other in zip(torch.autograd.grad(got, moved, grad), torch.autograd.grad(expected, moved, grad),
                          strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_first_of_equal_maxima_gets_the_gradient():
    hidden = torch.ones(1, 200, 16, device=DEVICE, requires_grad=True)
    mask = torch.ones(1, 200, dtype=torch.bool, device=DEVICE)
    mask[0, :2] = False
    max_logits(hidden, torch.ones(1, 16, device=DEVICE), None, mask, "triton").sum().backward()
    assert hidden.grad[0, :, 0].nonzero().flatten().tolist() == [2]


def test_a_large_vocabulary():
    leaves, mask = inputs(1, 4, 250_002, 16, torch.bfloat16)
    moved = on_device(leaves)
    with torch.no_grad():
        expected = max_logits(*(leaf.float() for leaf in moved), mask.to(DEVICE), "reference")
        torch.testing.assert_close(max_logits(*moved, mask.to(DEVICE), "triton"), expected, atol=1e-5, rtol=1e-5)


def test_no_text_and_no_sequence():
    leaves, mask = inputs()
    moved = on_device(leaves)
    pooled = max_logits(*moved, torch.zeros_like(mask, device=DEVICE), "triton")
    pooled.sum().backward()
    assert pooled.eq(0).all() and all(leaf.grad.eq(0).all() for leaf in moved)
    none = max_logits(moved[0][:0], *moved[1:], mask[:0].to(DEVICE), "triton")
    none.sum().backward()
    assert none.shape == (0, 33)


def test_nan_shows():
    leaves, mask = inputs(4, 70, 33, 5)
    moved = on_device(leaves)
    broken = moved[0].detach().clone()
    broken[1, 1] = float("nan")
    pooled = max_logits(broken, *moved[1:], mask.to(DEVICE), "triton")
    assert pooled[1].isnan().all() and pooled[0].isfinite().all()


def test_only_text_is_read():
    leaves, mask = inputs(dtype=torch.float16)
    hidden, weight, bias = on_device(leaves)
    mask = mask.to(DEVICE)
    spoiled = hidden.detach().masked_fill(~mask.unsqueeze(-1), float("nan"))
    assert torch.equal(max_logits(spoiled, weight, bias, mask, "triton"),
                       max_logits(hidden, weight, bias, mask, "triton"))


def test_autocast_computes_in_its_type():
    leaves, mask = inputs(width=64)
    moved, mask = on_device(leaves), mask.to(DEVICE)
    with torch.no_grad():
        expected = max_logits(*(leaf.bfloat16().float() for leaf in moved[:2]), moved[2], mask, "reference")
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            torch.testing.assert_close(max_logits(*moved, mask, "triton"), expected, atol=1e-5, rtol=1e-5)


def test_without_gradients_no_place_is_kept(monkeypatch):
    leaves, mask = inputs()
    kept = []
    original = head._triton().tiled_max
    monkeypatch.setattr(head._triton(), "tiled_max", lambda *a: kept.append(original(*a)[1]) or original(*a))
    with torch.no_grad():
        max_logits(*on_device(leaves), mask.to(DEVICE), "triton")
    assert kept == [None]


def test_it_is_deterministic():
    leaves, mask = inputs(batch=6, length=20, vocabulary=300, width=8)
    moved, grad = on_device(leaves), gradient((6, 300)).to(DEVICE)
    runs = [torch.autograd.grad(max_logits(*moved, mask.to(DEVICE), "triton"), moved, grad) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_trial_before_it_is_chosen(dtype, monkeypatch):
    triton, device = head._triton(), torch.device(DEVICE)
    assert triton.agrees(device, dtype)
    original = triton.tiled_max
    monkeypatch.setattr(triton, "tiled_max", lambda *args: (original(*args)[0] + 1, original(*args)[1]))
    assert not triton.agrees(device, dtype)


def test_a_kernel_that_does_not_run_is_not_chosen(monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler")

    triton = head._triton()
    monkeypatch.setattr(triton, "agrees", broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton.runs_on.cache_clear()
    with pytest.warns(UserWarning, match="no compiler"):
        assert head.choose_implementation("auto", torch.device("cuda", 0), torch.float16) == "chunked"
    triton.runs_on.cache_clear()


def test_float64_is_refused_and_auto_knows_where_it_runs():
    leaves, mask = inputs(dtype=torch.float64)
    with pytest.raises(InputError, match="does not compute torch.float64"):
        max_logits(*leaves, mask, "triton")
    assert head.choose_implementation("auto", torch.device("cpu"), torch.float32) == "chunked"
    if DEVICE == "cuda":
        assert head.choose_implementation("auto", torch.device("cuda"), torch.float32) == "triton"
