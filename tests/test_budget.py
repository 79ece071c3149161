"""Micro-batches by a budget of tokens: every text once, within the budget, as many on all ranks, and balanced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import SIZES

from lexmae.config import BottleneckConfig, LossConfig, MaskingConfig, NegativesConfig
from lexmae.data.batches import PretrainData, RankingData
from lexmae.data.budget import balanced, cut, deal
from lexmae.model import attention, backbone
from lexmae.model.encoder import SparseEncoder
from lexmae.model.pretrainer import Pretrainer
from lexmae.train.objectives import PretrainObjective, RankingModel, RankingObjective


def lengths(count: int, seed: int = 0, longest: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, longest + 1, count).astype(np.int32)


def tokens(group: np.ndarray, sizes: np.ndarray, packed: bool) -> int:
    return int(sizes[group].sum() if packed else sizes[group].max() * len(group))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count, budget", [(1, 60), (7, 60), (64, 130), (200, 1000), (50, 10**9)])
def test_every_text_once_within_the_budget(count, budget, packed):
    for seed in range(5):
        sizes = lengths(count, seed)
        groups = cut(sizes, budget, packed=packed)
        assert sorted(np.concatenate(groups).tolist()) == list(range(count))
        assert all(0 < tokens(group, sizes, packed) <= budget for group in groups)
        assert np.all(np.diff(sizes[np.concatenate(groups)]) <= 0)


@pytest.mark.parametrize("packed", [False, True])
def test_no_cut_of_neighbours_has_fewer_groups(packed):
    for seed in range(20):
        sizes = lengths(9, seed, 20)
        ordered = np.sort(sizes)[::-1]
        fewest = min(bin(cuts).count("1") + 1 for cuts in range(2**8)
                     if all(tokens(part, ordered, packed) <= 50
                            for part in np.split(np.arange(9), [i + 1 for i in range(8) if cuts >> i & 1])))
        assert len(cut(sizes, 50, packed=packed)) == fewest


def test_a_text_beyond_the_budget_stands_alone():
    groups = cut(np.array([3, 50, 4, 3]), 10)
    assert [group.tolist() for group in groups][0] == [1] and len(groups) == 3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [4, 7, 12])
def test_as_many_groups_as_asked_for(groups, packed):
    sizes = lengths(12, 3, 9)
    found = cut(sizes, 40, packed=packed, groups=groups)
    assert len(found) == groups and all(len(group) for group in found)
    assert sorted(np.concatenate(found).tolist()) == list(range(12))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_have_as_many_micro_batches_and_about_as_many_tokens(world, packed):
    for seed in range(10):
        sizes = lengths(240, seed)
        ranks = deal(sizes, 300, world, packed=packed)
        assert len({len(rank) for rank in ranks}) == 1 and len(ranks) == world
        together = np.concatenate([np.concatenate(rank) for rank in ranks])
        assert sorted(together.tolist()) == list(range(240))
        assert all(tokens(group, sizes, packed) <= 300 for rank in ranks for group in rank)
        totals = [sum(tokens(group, sizes, packed) for group in rank) for rank in ranks]
        assert max(totals) - min(totals) <= 300


def test_a_batch_of_one_text_on_each_rank():
    assert [[group.tolist() for group in rank] for rank in deal(np.array([5, 9]), 100, 2)] == [[[1]], [[0]]]


def test_equal_lengths_are_cut_in_the_order_they_come():
    assert [group.tolist() for group in cut(np.full(6, 4), 8)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_order_that_balances_contiguous_shares(world):
    sizes = lengths(48, 5)
    order = balanced(sizes, world)
    assert sorted(order.tolist()) == list(range(48))
    totals = sizes[order].reshape(world, -1).sum(1)
    assert totals.max() - totals.min() <= 60
    if world == 1:
        assert order.tolist() == list(range(48))


# ---------------------------------------------------------------------------- what a step of training makes of it


def model_for(shards, packed: bool):
    special = {name: getattr(shards.special, name) for name in ("pad", "unk", "cls", "sep", "mask")}
    torch.manual_seed(0)
    lm = backbone.create_masked_lm("bert", shards.vocab_size, special, {**SIZES["bert"], "max_position_embeddings": 32})
    if packed:
        attention.use_packing(lm)
    return lm


def gradients(model) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_pretraining_has_the_loss_of_the_whole_batch(tiny_shards, world, packed):
    model = Pretrainer(model_for(tiny_shards, packed), 2).eval()
    objective, masks = PretrainObjective(BottleneckConfig(), packed), MaskingConfig()

    def step(ranks: list) -> tuple[float, torch.Tensor]:
        totals = [float(sum(values)) for values in zip(*map(objective.counts, ranks), strict=True)]
        losses = [objective.loss(model, batch, totals, 0, 1)[0] for batches in ranks for batch in batches]
        sum(losses).backward()
        return sum(loss.item() for loss in losses), gradients(model)

    whole = step([PretrainData(tiny_shards, masks, seed=5, batch=16, micro_batch=16)(2)])
    cut_up = [PretrainData(tiny_shards, masks, seed=5, batch=16, micro_batch=0, rank=rank, world=world,
                           micro_tokens=64, packed=packed)(2) for rank in range(world)]
    assert sum(map(len, cut_up)) > 4
    found = step(cut_up)
    assert found[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(found[1], whole[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_fine_tuning_has_the_loss_of_the_whole_batch(tiny_shards, lists, world, packed):
    """Every rank makes the loss of the global batch of the vectors of all; here each knows the others' beforehand."""
    model = RankingModel(SparseEncoder(model_for(tiny_shards, packed)), recompute=True).eval()
    negatives = NegativesConfig(per_query=3)
    config = LossConfig(lambda_docs=0.01, lambda_queries=0.02)

    def batch(**options):
        return RankingData(tiny_shards, "train", lists, negatives, seed=2, batch=6, **options)(1)

    expected = RankingObjective(config, lambda rows: rows, 1).loss(model, batch(micro_batch=100), [], 0, 1)[0]
    expected.backward()
    wanted = gradients(model)
    ranks = [batch(micro_batch=0, micro_tokens=64, packed=packed, rank=rank, world=world) for rank in range(world)]
    with torch.no_grad():
        known = [model(rank) for rank in ranks]
    total = torch.zeros_like(wanted)
    for number, own in enumerate(ranks):
        sides = iter(range(2))

        def gather(rows: torch.Tensor, number=number, sides=sides) -> torch.Tensor:
            side = next(sides)
            return torch.cat([rows if rank == number else known[rank][side] for rank in range(world)])

        loss = RankingObjective(config, gather, world).loss(model, own, [], 0, 1)[0] * world
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
        total += gradients(model)
    torch.testing.assert_close(total, wanted, atol=1e-5, rtol=1e-4)
