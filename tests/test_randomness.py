"""Keyed random numbers: against a scalar SplitMix64 and against the statistics of a uniform distribution."""

from __future__ import annotations

import numpy as np
import pytest

from lexmae.data.randomness import KeyedRandom, mix

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def splitmix(state: int, count: int) -> list[int]:
    """The published algorithm in whole numbers of unlimited size (Steele et al. 2014, figure 17)."""
    found = []
    for _ in range(count):
        state = (state + GAMMA) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


def test_the_mixer_is_splitmix64s():
    # First outputs of the reference implementation in C for the seed 1234567.
    assert splitmix(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = (1234567 + GAMMA * np.arange(1, 4, dtype=object)) & MASK
    with np.errstate(over="ignore"):
        assert mix(states.astype(np.uint64)).tolist() == splitmix(1234567, 3)


def test_a_row_of_bits_is_a_splitmix_sequence():
    random = KeyedRandom(42, np.array([5, 900]))
    for example, bits in zip((5, 900), random.bits(3, 6), strict=True):
        assert bits.tolist() == splitmix(start_of(42, example, 3), 6)


def start_of(seed: int, example: int, stream: int) -> int:
    """The state that a row's sequence starts from."""
    def one(value):
        return splitmix((value - GAMMA) & MASK, 1)[0]

    base = one((seed * GAMMA + GAMMA) & MASK)
    key = one((example * GAMMA + base) & MASK)
    return one((key + (stream + 1) * 0x94D049BB133111EB) & MASK)


def test_numbers_depend_on_the_example_alone():
    together = KeyedRandom(1, np.arange(100)).uniform(2, 9)
    for chosen in ([17], [99, 3], [50, 50]):
        assert np.array_equal(KeyedRandom(1, np.array(chosen)).uniform(2, 9), together[chosen])
    assert np.array_equal(KeyedRandom(1, np.arange(100)).uniform(2, 5), together[:, :5])


def test_seed_stream_and_example_each_matter():
    one = KeyedRandom(1, np.arange(50)).bits(0, 20)
    others = [KeyedRandom(2, np.arange(50)).bits(0, 20), KeyedRandom(1, np.arange(50)).bits(1, 20),
              KeyedRandom(1, np.arange(50) + 50).bits(0, 20)]
    assert len(np.unique(np.concatenate([one, *others]))) == 4 * one.size


@pytest.mark.parametrize("seed", [0, 42])
def test_uniform_numbers_are_uniform_and_independent(seed):
    values = KeyedRandom(seed, np.arange(400)).uniform(0, 100)
    assert values.min() >= 0 and values.max() < 1
    counts = np.bincount((values * 20).astype(int).ravel(), minlength=20)
    expected = values.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    other = KeyedRandom(seed, np.arange(400)).uniform(1, 100)
    for a, b in ((values, other), (values[:-1], values[1:]), (values[:, :-1], values[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_large_positions_and_seeds_work():
    values = KeyedRandom(2**63 + 1, np.array([2**62, 2**62 + 1])).uniform(7, 3)
    assert len(np.unique(values)) == 6
