"""Randomness by counter: every draw is a function of (seed, step, index), so no state is saved or replayed."""

from __future__ import annotations

import numpy as np

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def _splitmix(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def mix(*values: int) -> int:
    """Hash integers to 64 bits; the same on every machine and in every version."""
    state = 0
    for value in values:
        state = _splitmix((state + _GAMMA + (value & _MASK)) & _MASK)
    return state


def draws(seed: int, step: int, start: int, count: int) -> np.ndarray:
    """Draw numbers `start` to `start + count` of a step, uint64, each a function of (seed, step, its index) alone."""
    z = np.uint64(mix(seed, step)) + np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Shuffle the numbers from 0 to `count`, int64, as a function of (seed, epoch, count) alone."""
    return np.argsort(draws(seed, epoch, 0, count), kind="stable")
