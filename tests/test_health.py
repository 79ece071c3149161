"""Whose examples a step has, and when a lexicon should be sparse; what the loop makes of it is in test_loop.py."""

from __future__ import annotations

import pytest
import torch

from lexmae.config import (
    FinetuneRecipe,
    LossConfig,
    MaskingConfig,
    NegativesConfig,
    OptimizationConfig,
    PretrainRecipe,
)
from lexmae.data.batches import PretrainData, RankingData
from lexmae.data.pairs import RerankData
from lexmae.train import health


def test_examples_of_pretraining_are_the_texts_of_the_batch(tiny_shards):
    data = PretrainData(tiny_shards, MaskingConfig(), seed=5, batch=6, micro_batch=3, rank=0, world=1)
    for step in (0, 9):
        names = health.example_ids(data)(step)
        assert len(names) == 6 and all(name.startswith("document d") for name in names)
        rows = [tiny_shards.docs.ids().index(name.removeprefix("document ")) for name in names]
        lengths = sorted(int(text.attention_mask.sum()) for batch in data(step) for text in [batch.text])
        assert sum(lengths) == int(tiny_shards.docs.lengths[rows].sum())


@pytest.mark.parametrize("kind", [RankingData, RerankData])
def test_examples_of_ranking_are_judged_pairs(tiny_shards, lists, kind):
    more = {"max_length": 32} if kind is RerankData else {}
    data = kind(tiny_shards, "train", lists, NegativesConfig(per_query=2), seed=5, batch=4, micro_batch=4, rank=1,
                world=2, **more)
    names = health.example_ids(data)(3)
    judged = tiny_shards.qrels("train")
    assert len(names) == 4
    for name in names:
        _, query, _, _, document = name.split()
        assert judged[query][document] > 0


def test_a_lexicon_is_watched_in_fine_tuning_once_both_ramps_are_over():
    recipe = FinetuneRecipe("d", "o", loss=LossConfig(lambda_docs=1e-3, lambda_ramp=0.25),
                            optimization=OptimizationConfig(warmup=0.1))
    watch = health.watch_lexicon(recipe, 100, 1000, ["terms_docs empty"])
    assert watch.settled == 250 and watch.said == ["terms_docs empty"]
    assert health.watch_lexicon(PretrainRecipe("d", "o"), 100, 1000, []) is None


def test_shares_of_the_ranks_are_summed():
    watch = health.LexiconWatch(10, settled=0)
    metrics = {"terms_docs": torch.tensor(2.0), "loss": torch.tensor(1.0)}  # the share of one of three ranks
    found = [(done, watch.look(done, metrics, lambda sums: sums * 3)) for done in range(1, 151)]
    (done, (text,)), = [one for one in found if one[1]]
    assert done == 50 and "6 of 10 terms are active in a document vector" in text
