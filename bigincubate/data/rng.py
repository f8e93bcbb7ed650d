"""Seed the global random generators from a key, and restore their state afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..config.seeds import generator_seed

_GENERATOR = np.random.MT19937()  # replaces numpy's global one inside `preserve_rng_state`


def seed_rng(*key: int | str, torch_only: bool = False) -> None:
    """Seed the global generators of `random`, numpy and torch (CPU) from ``key`` only.

    Args:
        key: Determines all draws.
        torch_only: Seed only torch's generator, for code that uses no other.
    """
    seed = generator_seed(*key)
    torch.default_generator.manual_seed(seed)
    if not torch_only:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the state of the global generators on exit (except for one Gaussian sample that numpy may have cached).

    This takes longer than all random draws for a small image, so use it once per batch. It cannot be nested.
    """
    python_state, numpy_generator, torch_state = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    try:
        np.random.set_bit_generator(_GENERATOR)  # replacing the generator is 30 times as fast as copying its state
        yield
    finally:
        random.setstate(python_state)
        np.random.set_bit_generator(numpy_generator)
        torch.set_rng_state(torch_state)


@contextmanager
def seeded_rng(*key: int | str) -> Iterator[None]:
    """Run a block with the global generators seeded from ``key``, and restore their state. It cannot be nested."""
    with preserve_rng_state():
        seed_rng(*key)
        yield
