"""Random numbers that are functions of their key and of nothing else.

A run that is killed and resumed, or spread over another number of workers or ranks, must see the same pictures in the
same order with the same augmentation. So nothing here has a state: every number is a hash of a key such as (seed,
epoch, index). The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), chained over the parts of the key. It does not depend on the version of any library, so
splits stay what they are.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int64, UInt64

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _scramble(value: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    value = value + _GAMMA
    value = (value ^ (value >> np.uint64(30))) * _MULTIPLIERS[0]
    value = (value ^ (value >> np.uint64(27))) * _MULTIPLIERS[1]
    return value ^ (value >> np.uint64(31))


def hash_key(*key: int | np.ndarray) -> UInt64[np.ndarray, "*shape"]:
    """Hash integers to 64 bits each; arrays among `key` broadcast against each other."""
    result = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in key:
            result = _scramble(result ^ np.asarray(part, dtype=np.int64).astype(np.uint64))
    return result


def permutation(length: int, *key: int) -> Int64[np.ndarray, " {length}"]:
    """The numbers 0 to length - 1 in an order that is a function of `key`."""
    return np.argsort(hash_key(*key, np.arange(length)), kind="stable").astype(np.int64)


def seed_everything(seed: int) -> None:
    """Seed the global generators of random, numpy and torch (CPU), 64 bits. Pictures are augmented with all three."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 (the generator that augmentation draws from)
    torch.default_generator.manual_seed(seed >> 1)


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Leave the global generators of random, numpy and torch (CPU) as they were found."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])
