"""Micro-batches by a budget of tokens: every text once, within the budget, as many on all ranks, and balanced."""

from __future__ import annotations

import numpy as np
import pytest

from lexmae.data.budget import balanced, cut, deal


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
