"""An untrained model with the lexical start names its own input tokens, in every family."""

from __future__ import annotations

import math

import pytest
import torch

from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.encoder import SparseEncoder
from lexmae.model.lexical_start import level_bias, penalise_frequency, start_lexical

SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
SIZES = {
    "distilbert": {"dim": 96, "n_layers": 2, "n_heads": 4, "hidden_dim": 192, "max_position_embeddings": 40},
    **{name: {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192,
              "max_position_embeddings": 40} for name in ("bert", "roberta", "xlm-roberta", "modernbert")},
}


def own_tokens(family: str, start: bool) -> float:
    """Share of a text's tokens that are among its ten heaviest entries."""
    torch.manual_seed(0)
    lm = backbone.create_masked_lm(family, 500, SPECIAL, SIZES[family])
    if start:
        start_lexical(lm)
    ids = torch.stack([torch.randperm(495)[:12] + 5 for _ in range(8)])
    ids[:, 0], ids[:, -1] = 2, 3
    text = torch.ones_like(ids, dtype=torch.bool)
    text[:, 0] = text[:, -1] = False
    with torch.no_grad():
        vectors = SparseEncoder(lm).eval()(ids, torch.ones_like(ids), text, torch.zeros_like(ids))
    top = vectors.topk(10).indices
    return sum(len(set(ids[i, 1:-1].tolist()) & set(top[i].tolist())) for i in range(8)) / 80


@pytest.mark.parametrize("family", SIZES)
def test_own_tokens_lead(family):
    assert own_tokens(family, start=True) > 0.9
    assert own_tokens(family, start=False) < 0.5


def test_seed_decides_the_weights():
    torch.manual_seed(1)
    first = backbone.create_masked_lm("bert", 500, SPECIAL, SIZES["bert"])
    start_lexical(first)
    torch.manual_seed(1)
    second = backbone.create_masked_lm("bert", 500, SPECIAL, SIZES["bert"])
    start_lexical(second)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_frequency_penalty_by_hand():
    torch.manual_seed(0)
    lm = backbone.create_masked_lm("bert", 500, SPECIAL, SIZES["bert"])
    bias = lm.get_output_embeddings().bias
    before = bias.detach().clone()
    frequency = torch.tensor([0, 1, 50, 100])
    penalise_frequency(lm, frequency, 100, penalty=6.0)
    for token, df in enumerate(frequency.tolist()):
        idf = math.log(1 + (100 - df + 0.5) / (df + 0.5)) / math.log(1 + 100.5 / 0.5)
        assert float(before[token] - bias[token]) == pytest.approx(6.0 * (1 - idf), abs=1e-5)
    assert torch.equal(bias[4:], before[4:])
    assert bias[1] > bias[2] > bias[3]


def test_frequency_penalty_needs_a_bias():
    size = {**SIZES["modernbert"], "decoder_bias": False}
    lm = backbone.create_masked_lm("modernbert", 500, SPECIAL, size)
    with pytest.raises(InputError, match="no output bias"):
        penalise_frequency(lm, torch.zeros(500), 10, 1.0)


def texts(lengths: list[int]) -> dict[str, torch.Tensor]:
    """A padded batch of random texts between [CLS] and [SEP]."""
    ids = torch.randint(5, 500, (len(lengths), max(lengths) + 2))
    place, length = torch.arange(ids.shape[1])[None], torch.tensor(lengths)[:, None]
    text = (place > 0) & (place <= length)
    return {"input_ids": ids, "attention_mask": (place <= length + 1).long(), "text_mask": text}


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_level_bias_gives_the_wanted_number_of_terms(family, shift):
    torch.manual_seed(0)
    lm = backbone.create_masked_lm(family, 500, SPECIAL, SIZES[family])
    batches = [texts([9, 3]), texts([5, 0, 7])]  # a text without tokens does not count
    bias = lm.get_output_embeddings().bias
    with torch.no_grad():
        bias += shift
    before, others = bias.clone(), [p.clone() for p in lm.parameters() if p is not bias]
    added = level_bias(lm, batches, 20)
    assert torch.equal(bias, before + added) and lm.training
    assert all(torch.equal(a, b) for a, b in zip(others, (p for p in lm.parameters() if p is not bias), strict=True))
    encoder = SparseEncoder(lm).eval()
    vectors = torch.cat([encoder(**batch) for batch in batches])
    assert int((vectors > 0).sum()) in range(20 * 4 - 3, 20 * 4 + 4), "entries beside the cut may be rounded over it"


def test_level_bias_refuses_what_it_cannot_do():
    lm = backbone.create_masked_lm("bert", 500, SPECIAL, SIZES["bert"])
    with pytest.raises(InputError, match="start_terms 500: the vocabulary has 500 entries"):
        level_bias(lm, [texts([3])], 500)
    with pytest.raises(InputError, match="no text whose terms"):
        level_bias(lm, [texts([0, 0])], 5)
    bare = backbone.create_masked_lm("modernbert", 500, SPECIAL, {**SIZES["modernbert"], "decoder_bias": False})
    with pytest.raises(InputError, match="start_terms: this backbone's LM head has no output bias"):
        level_bias(bare, [texts([3])], 5)
