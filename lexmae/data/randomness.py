"""Random numbers as a pure function of (seed, stream, example, position): no state to save, the same on any rank.

A counter-based generator (SplitMix64, Steele et al. 2014, "Fast splittable pseudorandom number generators") is
evaluated for whole arrays at once, so masks and draws of an example do not depend on which rank, micro-batch or
worker computes them.
"""

from __future__ import annotations

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def mix(value: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser: uint64 → uint64, a bijection that spreads every input bit over the output."""
    value = (value ^ (value >> np.uint64(30))) * _MIX1
    value = (value ^ (value >> np.uint64(27))) * _MIX2
    return value ^ (value >> np.uint64(31))


class KeyedRandom:
    """Random arrays of a batch of examples.

    Args:
        seed: seed of the run.
        examples: int64 [B], what names each example of the epoch-less stream (its position in the run).
    """

    def __init__(self, seed: int, examples: np.ndarray):
        with np.errstate(over="ignore"):
            base = mix(np.uint64(seed) * _GAMMA + _GAMMA)
            self._keys = mix(np.asarray(examples).astype(np.uint64) * _GAMMA + base)  # [B]

    def bits(self, stream: int, length: int) -> np.ndarray:
        """uint64 [B, length], independent between streams."""
        with np.errstate(over="ignore"):
            counter = (np.arange(length, dtype=np.uint64) + np.uint64(1)) * _GAMMA
            start = mix(self._keys + np.uint64(stream + 1) * _MIX2)
            return mix(start[:, None] + counter[None, :])

    def uniform(self, stream: int, length: int) -> np.ndarray:
        """float64 [B, length] in [0, 1)."""
        return (self.bits(stream, length) >> np.uint64(11)) * (1.0 / (1 << 53))
