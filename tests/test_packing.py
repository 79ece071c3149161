"""Packed batches: the numbers of padded ones, for every backbone, with the padding left out."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_models import SIZES, batch, masked, tiny
from torch import nn

from lexmae.config import FinetuneRecipe, ModelConfig, RerankRecipe
from lexmae.model import attention, backbone, lexicon
from lexmae.model.encoder import SparseEncoder
from lexmae.model.head import max_logits
from lexmae.model.packing import Packing
from lexmae.model.pooling import Pooling
from lexmae.model.pretrainer import Pretrainer
from lexmae.train import parts
from lexmae.train.hardware import Hardware

LENGTHS = (4, 20, 9, 13)


def example(seed: int = 1) -> dict[str, torch.Tensor]:
    """Arguments of a pre-trainer's forward, texts in no order of length."""
    inputs = batch(seed, LENGTHS)
    enc_ids, enc_labels = masked(inputs, seed, 0.3)
    dec_ids, dec_labels = masked(inputs, seed + 1, 0.5)
    return {**inputs, "input_ids": enc_ids, "enc_labels": enc_labels, "dec_input_ids": dec_ids,
            "dec_labels": dec_labels}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_there_and_back():
    mask = batch(0, LENGTHS)["attention_mask"]
    packing = Packing.of(mask)
    values = torch.randn(len(LENGTHS), 20, 3)
    packed = packing.pack(values)
    assert packed.shape == (sum(LENGTHS), 3) and packing.starts.tolist() == [0, 4, 24, 33, 46]
    assert torch.equal(packing.pad(packed), values * mask.unsqueeze(-1))
    assert packing.positions.tolist() == [i for n in LENGTHS for i in range(n)]
    assert torch.equal(packed[packing.first], values[:, 0])


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("source", lexicon.SOURCES)
def test_pretraining(family, source):
    """Losses to 1e-5 of their value, gradients too, and no token of padding in any layer."""
    arguments, results = example(), []
    for packed in (False, True):
        lm = tiny(family)
        if packed:
            attention.use_packing(lm)
        torch.manual_seed(1)
        model = Pretrainer(lm, 2, source, bag_of_words=True).eval()
        rows = count_rows(model)
        out = model(**arguments)
        (out["enc_loss_sum"] + out["dec_loss_sum"] + out["bow_loss_sum"]).backward()
        expected = sum(LENGTHS) if packed else len(LENGTHS) * max(LENGTHS)
        assert len(rows) > 8 and set(rows) == {expected}
        results.append((out, gradients(model)))
    (padded, one), (packed, other) = results
    for name in padded:
        torch.testing.assert_close(packed[name], padded[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert_same(one, other)


def count_rows(model: nn.Module) -> list[int]:
    """Fills up with the number of tokens that each linear layer inside the transformers sees."""
    seen: list[int] = []
    for part in (model.lm.base_model, model.decoder.layers.base_model):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("pooling", [Pooling(), Pooling("sum"), Pooling(skipped=(2, 3))], ids=["max", "sum", "all"])
def test_vectors(family, pooling):
    lm, inputs = tiny(family), batch(2, LENGTHS)
    padded = SparseEncoder(lm, pooling=pooling)(**inputs)
    padded.square().mean().backward()
    wanted = gradients(lm)
    attention.use_packing(lm)
    packed = SparseEncoder(lm, pooling=pooling)(**inputs)
    packed.square().mean().backward()
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    assert_same(gradients(lm), wanted)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_the_head(implementation):
    torch.manual_seed(0)
    inputs = batch(3, LENGTHS)
    packing = Packing.of(inputs["attention_mask"])
    leaves = [torch.randn(len(LENGTHS), 20, 6), torch.randn(33, 6), torch.randn(33)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    inputs["text_mask"][2] = False  # a text without text tokens
    grad = torch.randn(len(LENGTHS), 33) * (torch.rand(len(LENGTHS), 33) < 0.5)
    padded = max_logits(*leaves, inputs["text_mask"], implementation)
    packed = max_logits(packing.pack(leaves[0]), *leaves[1:], inputs["text_mask"], implementation, packing)
    torch.testing.assert_close(packed, padded)
    for one, other in zip(torch.autograd.grad(padded, leaves, grad), torch.autograd.grad(packed, leaves, grad),
                          strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", SIZES)
def test_a_packed_model_still_computes_padded_batches(family):
    lm, inputs = tiny(family), batch(4, LENGTHS)
    del inputs["text_mask"]
    expected = backbone.hidden_states(lm, **inputs)
    attention.use_packing(lm)
    torch.testing.assert_close(backbone.hidden_states(lm, **inputs), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("packing", "gpu", "section", "expected"), [
    ("auto", True, {"bf16": {"enabled": True}}, True), ("auto", True, {}, False),
    ("auto", False, {}, True), ("auto", False, {"bf16": {"enabled": True}}, True), ("on", True, {}, True),
    ("off", True, {"bf16": {"enabled": True}}, False)])
def test_when_texts_are_packed(packing, gpu, section, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    recipe = FinetuneRecipe("data", "output", model=ModelConfig(packing=packing))
    spread = Hardware(1, 4, 1, section)
    assert parts.packs(recipe, spread) == expected
    if packing != "on":
        assert not parts.packs(RerankRecipe("data", "output", model=recipe.model), spread)


def test_nothing_of_it_is_saved(tmp_path):
    lm = tiny("modernbert")
    attention.use_packing(lm)
    SparseEncoder(lm).save(tmp_path)
    assert "packed" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


# ------------------------------------------------------------------------------------------------- attention


def heads(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(LENGTHS), 2, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def by_text(query, key, value, scale: float, window: int | None) -> torch.Tensor:
    """Attention written out, one text at a time."""
    found, start = [], 0
    for length in LENGTHS:
        q, k, v = (each[start:start + length].transpose(0, 1) for each in (query, key, value))  # [A, n, D]
        scores = q @ k.transpose(1, 2) * scale
        if window is not None:
            place = torch.arange(length)
            scores = scores.masked_fill((place[:, None] - place[None]).abs() > window, float("-inf"))
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 0, 3])
def test_attention_stays_within_a_text(window):
    packing, leaves = Packing.of(batch(0, LENGTHS)["attention_mask"]), heads(1)
    expected = by_text(*leaves, 0.4, window)
    got = attention.attend(*leaves, packing, 0.4, 0.0, window)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    grad = torch.randn(got.shape)
    for one, other in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad),
                          strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_dropout_of_attention():
    """It drops weights, and what it leaves is on average what it was."""
    packing, leaves = Packing.of(batch(0, LENGTHS)["attention_mask"]), heads(2)
    with torch.no_grad():
        expected = attention.attend(*leaves, packing)
        runs = torch.stack([attention.attend(*leaves, packing, dropout=0.2) for _ in range(400)])
    assert not torch.allclose(runs[0], runs[1]) and (runs.mean(0) - expected).abs().mean() < 0.03


def test_a_cpu_pads_attention():
    query = heads(0)[0]
    assert attention.choose(query) == attention.choose(query.bfloat16()) == "padded"


@pytest.mark.parametrize(("form", "reason"), [
    (attention._padded, None),
    (attention._flash, "NotImplementedError"),
    (lambda *a: 2 * attention._padded(*a), "other values"),
    (lambda *a: attention._padded(*a[:6], None), "other values"),  # no windows
    (lambda *a: _Forgetful.apply(*a), "other values")])
def test_flash_attention_that_fails_is_not_chosen(form, reason, monkeypatch):
    """On a CPU it has no kernel."""
    monkeypatch.setattr(attention, "_failed", set())
    monkeypatch.setitem(attention._FORMS, "flash", form)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attention.try_out(torch.device("cpu"), 8, True, (torch.float32,))
    texts = [str(one.message) for one in caught if "flash attention" in str(one.message)]
    assert attention._failed == (set() if reason is None else {torch.float32})
    assert len(texts) == (reason is not None) and all(f"in torch.float32: {reason}" in text for text in texts)


class _Forgetful(torch.autograd.Function):
    """Attention whose backward pass drops other weights than its forward pass."""

    @staticmethod
    def forward(ctx, query, key, value, packing, scale, dropout, window):
        ctx.save_for_backward(query, key, value)
        ctx.rest = packing, scale, dropout, window
        return attention._padded(query, key, value, *ctx.rest)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            out = attention._padded(*leaves, *ctx.rest)
        return *torch.autograd.grad(out, leaves, grad), None, None, None, None


@pytest.mark.parametrize("window", [None, 3])
def test_the_operator_takes_what_it_is_given(window):
    """Its kernel needs a GPU; shapes and gradients do not."""
    leaves = [leaf.detach().to("meta").requires_grad_() for leaf in heads(0)]
    packing = Packing.of(batch(0, LENGTHS)["attention_mask"])
    packing = Packing(*(each.to("meta") for each in (packing.index, packing.starts, packing.mask)))
    got = attention._flash(*leaves, packing, None, 0.1, window)
    assert got.shape == leaves[0].shape
    assert [each.shape for each in torch.autograd.grad(got.sum(), leaves)] == [leaf.shape for leaf in leaves]


def test_the_form_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "_failed", set())
    capability = (9, 0)
    query = SimpleNamespace(dtype=torch.bfloat16, shape=(5, 2, 64), device=torch.device("cuda", 0))
    assert attention.choose(query) == "flash"
    for other in ({"dtype": torch.float32}, {"shape": (5, 2, 20)}, {"shape": (5, 2, 512)}):
        assert attention.choose(SimpleNamespace(**{**vars(query), **other})) == "padded"
    attention._failed.add(torch.float16)
    assert attention.choose(query) == "flash"
    attention._failed.add(torch.bfloat16)
    assert attention.choose(query) == "padded"
    attention._failed.clear()
    capability = (7, 5)
    assert attention.choose(query) == "padded"


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), 1), ((7, 5), 0)])
def test_flash_attention_is_tried_out_where_it_would_be_chosen(capability, expected, monkeypatch):
    tried = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "try_out", lambda *args: tried.append(args))
    attention.use_packing(tiny())
    assert len(tried) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_flash_attention_agrees(window, dropout):
    leaves = [leaf.detach().cuda().bfloat16().requires_grad_() for leaf in heads(3)]
    packing = Packing.of(batch(0, LENGTHS)["attention_mask"].cuda())
    assert attention.choose(leaves[0]) == "flash"
    got = attention.attend(*leaves, packing, 0.4, dropout, window)
    expected = attention._padded(*leaves, packing, 0.4, 0.0, window)
    torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)
    grad = torch.randn_like(got)
    for one, other in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad),
                          strict=True):
        torch.testing.assert_close(one, other, atol=3e-2, rtol=3e-2)
