from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lexmae.errors import InputError
from lexmae.model import lexicon


def by_hand(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """max over text tokens, one entry at a time."""
    batch, length, vocabulary = logits.shape
    out = np.zeros((batch, vocabulary), np.float32)
    for b in range(batch):
        for v in range(vocabulary):
            texts = [logits[b, t, v] for t in range(length) if mask[b, t]]
            out[b, v] = max(texts) if texts else 0.0
    return out


def test_max_pool_looks_at_text_tokens_only():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator) - 2
    mask = torch.rand(3, 5, generator=generator) < 0.5
    logits[:, :, 0][~mask] = 100.0
    np.testing.assert_array_equal(lexicon.max_pool(logits, mask).numpy(), by_hand(logits.numpy(), mask.numpy()))


def test_max_pool_gradient_goes_to_one_token():
    logits = torch.tensor([[[1.0], [3.0], [3.0], [9.0]]], requires_grad=True)
    lexicon.max_pool(logits, torch.tensor([[True, True, True, False]])).sum().backward()
    gradient = logits.grad.flatten().tolist()
    assert gradient[0] == gradient[3] == 0.0 and sorted(gradient[1:3]) == [0.0, 1.0]


def test_max_pool_without_text_is_zero_without_gradient():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[False] * 3, [True] * 3])
    pooled = lexicon.max_pool(logits, mask)
    pooled.sum().backward()
    assert pooled[0].eq(0).all() and logits.grad[0].eq(0).all() and logits.grad[1].sum() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saturate_is_log1p_of_relu_in_float32(dtype):
    values = torch.tensor([-5.0, 0.0, 1.0, 7.5], dtype=dtype)
    got = lexicon.saturate(values)
    assert got.dtype == torch.float32
    expected = [0.0, 0.0, math.log(2.0), math.log(8.5)]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_saturating_after_the_max_is_the_max_of_the_saturated():
    logits = torch.randn(4, 6, 9)
    mask = torch.rand(4, 6) < 0.6
    mask[:, 0] = True
    after = lexicon.saturate(lexicon.max_pool(logits, mask))
    before = lexicon.max_pool(lexicon.saturate(logits), mask)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_softmax_importance():
    pooled = torch.tensor([[0.0, math.log(3.0)], [500.0, 500.0]])
    torch.testing.assert_close(lexicon.importance(pooled), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))


def test_saturated_importance_sums_to_one_and_is_finite_when_nothing_is_positive():
    pooled = torch.tensor([[-1.0, math.e - 1, math.e**3 - 1], [-2.0, -1.0, 0.0]], requires_grad=True)
    weights = lexicon.importance(pooled, "saturated")
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.25, 0.75], [0.0, 0.0, 0.0]]))
    weights.sum().backward()
    assert pooled.grad.isfinite().all()


@pytest.mark.parametrize("source", lexicon.LEXICON_SOURCES)
def test_bottleneck_mixes_embeddings_and_stops_their_gradient(source):
    pooled = torch.randn(2, 5, requires_grad=True)
    table = torch.randn(5, 3, requires_grad=True)
    got = lexicon.bottleneck(pooled, table, source)
    weights = lexicon.importance(pooled, source)
    for b in range(2):
        expected = sum(weights[b, v] * table[v] for v in range(5))
        torch.testing.assert_close(got[b], expected)
    got.square().sum().backward()
    assert table.grad is None and pooled.grad.abs().sum() > 0


@pytest.mark.parametrize("source", lexicon.LEXICON_SOURCES)
def test_a_normalised_bottleneck(source):
    """As long as an embedding behind a LayerNorm, whatever its scale; nothing in, nothing out."""
    pooled, table = torch.randn(2, 50, requires_grad=True), torch.randn(50, 64)
    plain = lexicon.bottleneck(pooled, table, source)
    got = lexicon.bottleneck(pooled, table * 0.02, source, normalize=True)
    expected = plain - plain.mean(-1, keepdim=True)
    torch.testing.assert_close(got, expected * 64**0.5 / expected.norm(dim=-1, keepdim=True), rtol=1e-3, atol=1e-3)
    (got * torch.randn(64)).sum().backward()
    assert pooled.grad.isfinite().all() and pooled.grad.abs().sum() > 0
    assert not lexicon.bottleneck(torch.full((1, 50), -1.0), table, "saturated", normalize=True).any()


def test_bottleneck_stays_float32_under_autocast_and_for_half_precision():
    pooled, table = torch.randn(2, 50), torch.randn(50, 8)
    exact = torch.softmax(pooled, -1) @ table
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = lexicon.bottleneck(pooled, table)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact)
    assert lexicon.bottleneck(pooled.half(), table.half()).dtype == torch.float32


@pytest.mark.parametrize("source", ["cls", "off", "mean"])
def test_sources_without_a_lexicon_are_refused(source):
    with pytest.raises(InputError, match=source):
        lexicon.importance(torch.zeros(1, 2), source)


def test_top_k_keeps_the_largest():
    values = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.0, 3.0, 0.0, 2.0], [5.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(lexicon.top_k(values, 2), expected)
    assert torch.equal(lexicon.top_k(values, 4), values) and torch.equal(lexicon.top_k(values, 9), values)
    assert (lexicon.top_k(torch.ones(3, 10), 4) > 0).sum(1).tolist() == [4, 4, 4]
    with pytest.raises(InputError, match="positive"):
        lexicon.top_k(values, 0)


def test_top_k_passes_gradients_of_what_it_keeps():
    values = torch.tensor([[1.0, 4.0, 2.0]], requires_grad=True)
    lexicon.top_k(values, 1).sum().backward()
    assert values.grad.tolist() == [[0.0, 1.0, 0.0]]
