"""Micro-batches by a budget of tokens: texts of similar length together, as many as the budget holds.

Everything here is a function of lengths alone, so every rank works out the same cut of a global batch. All ranks get
the same number of micro-batches, which collective calls need, and about as many tokens.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """How a global batch is spread over ranks and micro-batches.

    Attributes:
        size: texts (or queries with their documents) of a micro-batch, where there is no budget.
        tokens: the budget of a micro-batch; 0 has none.
        packed: the budget counts tokens without padding.
    """

    rank: int
    world: int
    size: int
    tokens: int = 0
    packed: bool = False

    def micro_batches(self, lengths: np.ndarray) -> list[np.ndarray]:
        """This rank's micro-batches of a global batch, as positions in it, int64.

        Args:
            lengths: tokens of each example of the global batch, int [batch].
        """
        if self.tokens:
            return deal(lengths, self.tokens, self.world, packed=self.packed)[self.rank]
        own = np.arange(len(lengths))[share(self.rank, self.world, len(lengths))]
        order = own[np.argsort(-lengths[own], kind="stable")]
        return [order[start:start + self.size] for start in range(0, len(order), self.size)]

    def chunks(self, lengths: np.ndarray) -> list[np.ndarray]:
        """The chunks of this rank's texts, longest first, as positions among them; as many on every rank.

        Args:
            lengths: tokens of the texts of every rank, int [world, n].
        """
        own = lengths[self.rank]
        if self.tokens:
            most = max(len(cut(each, self.tokens, packed=self.packed)) for each in lengths)
            return cut(own, self.tokens, packed=self.packed, groups=most)
        order = np.argsort(-own, kind="stable")
        return [order[start:start + self.size] for start in range(0, len(order), self.size)]


def share(rank: int, world: int, batch: int) -> slice:
    """The part of a global batch that a rank computes; ``batch`` is a multiple of ``world``."""
    each = batch // world
    return slice(rank * each, (rank + 1) * each)


def cut(lengths: np.ndarray, budget: int, *, packed: bool = False, groups: int | None = None,
        multiple: int = 1) -> list[np.ndarray]:
    """Cut texts into groups, longest texts first, in the smallest number that the budget allows.

    Args:
        lengths: tokens of each text, int [n], n > 0.
        budget: most tokens of a group; a text that is longer stands alone.
        packed: count the tokens of a group without padding, rather than its size times its longest text.
        groups: cut into this many, at least as many as the budget asks for and at most n.
        multiple: their number is a multiple of this, which divides n.

    Returns:
        Positions in ``lengths``, int64, of each group. Among the cuts into so many groups it is one whose largest
        group is as small as can be, before groups that are missing are split off the largest.
    """
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order].astype(np.int64)
    before = np.concatenate([[0], np.cumsum(ordered)]) if packed else None
    if groups is None:
        groups = -(-len(_ends(ordered, before, budget)) // multiple) * multiple
    low, high = int(ordered[0]), max(budget, int(ordered[0]))
    while low < high:
        middle = (low + high) // 2
        if len(_ends(ordered, before, middle)) <= groups:
            high = middle
        else:
            low = middle + 1
    ends = _split(_ends(ordered, before, low), ordered, before, groups)
    return [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def deal(lengths: np.ndarray, budget: int, world: int, *, packed: bool = False) -> list[list[np.ndarray]]:
    """A global batch as the micro-batches of each rank: as many on each, the n-th of all ranks of similar length.

    Args:
        lengths: tokens of each text, int [n]; n is a multiple of ``world``.
    """
    found = cut(lengths, budget, packed=packed, multiple=world)
    size = [int(lengths[group].sum() if packed else lengths[group].max() * len(group)) for group in found]
    return [[found[i] for i in own] for own in _share_out(np.array(size).reshape(-1, world))]


def balanced(lengths: np.ndarray, world: int) -> np.ndarray:
    """An order of the examples in which the ranks' equal, contiguous shares have about as many tokens: int64 [n].

    Args:
        lengths: tokens of each example, int [n]; n is a multiple of ``world``.
    """
    order = np.argsort(-lengths, kind="stable")
    shares = _share_out(lengths[order].reshape(-1, world))
    return np.concatenate([np.sort(order[own]) for own in shares])


def _share_out(tokens: np.ndarray) -> list[list[int]]:
    """Which item each rank takes in every round: the largest goes to whoever has had least.

    Args:
        tokens: int [rounds, world].

    Returns:
        For each rank, one position of the flattened ``tokens`` per round.
    """
    rounds, world = tokens.shape
    taken: list[list[int]] = [[] for _ in range(world)]
    had = np.zeros(world, np.int64)
    for number in range(rounds):
        ranks = np.argsort(had, kind="stable")
        items = np.argsort(-tokens[number], kind="stable")
        had[ranks] += tokens[number, items]
        for rank, item in zip(ranks.tolist(), items.tolist(), strict=True):
            taken[rank].append(number * world + item)
    return taken


def _ends(ordered: np.ndarray, before: np.ndarray | None, budget: int) -> list[int]:
    """Where each of the fewest groups ends, of texts in descending order of length."""
    ends, start, count = [], 0, len(ordered)
    while start < count:
        if before is None:
            fitting = start + budget // max(1, int(ordered[start]))
        else:
            fitting = int(np.searchsorted(before, before[start] + budget, "right")) - 1
        start = min(max(start + 1, fitting), count)
        ends.append(start)
    return ends


def _split(ends: list[int], ordered: np.ndarray, before: np.ndarray | None, groups: int) -> list[int]:
    """Halve the largest groups of several texts until there are so many."""
    def entry(start: int, end: int) -> tuple[int, int, int]:
        tokens = (end - start) * int(ordered[start]) if before is None else int(before[end] - before[start])
        return (-tokens if end - start > 1 else 1, start, end)

    heap = [entry(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    heapq.heapify(heap)
    while len(heap) < groups:
        _, start, end = heapq.heappop(heap)
        middle = (start + end) // 2
        heapq.heappush(heap, entry(start, middle))
        heapq.heappush(heap, entry(middle, end))
    return sorted(end for *_, end in heap)
