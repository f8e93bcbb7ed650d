"""Random draws as a pure function of a key: seed the global generators, and restore them afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..seeds import generator_seed

_GENERATOR = np.random.MT19937()  # replaces numpy's global one inside `preserve_rng_state`


def seed_rng(*key: int | str, torch_only: bool = False) -> None:
    """Seed the global generators of `random`, numpy and torch (CPU) from ``key`` only.

    Args:
        key: Determines all draws.
        torch_only: Seed torch's generator only, for code that uses no other.
    """
    seed = generator_seed(*key)
    torch.default_generator.manual_seed(seed)
    if not torch_only:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the global generators afterwards (except for the one Gaussian that numpy may have cached).

    It takes longer than all other random work on a small image, so use it once per batch. It cannot be nested.
    """
    ours, numpys, torchs = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    try:
        np.random.set_bit_generator(_GENERATOR)  # a swap: copying numpy's state takes 30 times as long
        yield
    finally:
        random.setstate(ours)
        np.random.set_bit_generator(numpys)
        torch.set_rng_state(torchs)


@contextmanager
def seeded_rng(*key: int | str) -> Iterator[None]:
    """Run a block with the global generators seeded from ``key``, and restore them. It cannot be nested."""
    with preserve_rng_state():
        seed_rng(*key)
        yield
