"""Compute seeds as pure functions of their purpose, and define every string that a seed depends on.

All random draws of a run depend only on ``train.seed`` and the strings in this file. **Never rename or reorder them**:
another string gives other weights, masks, views or sample orders, and therefore other results for every recipe. Strings
and seeds are pinned by ``tests/unit/test_seeds.py``.
"""

from __future__ import annotations

import hashlib
from typing import Literal

INIT = "init"  # initial weights of a phase: stable_seed(train.seed, INIT, phase_key(phase, module))
MIX = "mix"  # Mixup and CutMix of a global batch: generator_seed(MIX, train.seed, step)
DROP_PATH = "drop_path"  # stochastic depth: drop_path_seed(train.seed, step)
PARTITION = "part of"  # partition of a sample in decentralized data: partition_number(name)


def phase_key(phase: str, module: int | None) -> str:
    """Return the name of a phase with the index of its module, if any, such as ``incubate/3``."""
    return phase if module is None else f"{phase}/{module}"


def stable_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends only on ``parts``, not on the machine, the rank or the Python version."""
    return _hash("\0".join(map(str, parts)), "big") >> 1


def drop_path_seed(seed: int, step: int) -> int:
    """Return the 63-bit seed of the drop-path masks of an optimizer step."""
    return _hash(f"{DROP_PATH} {seed} {step}", "big") >> 1


def generator_seed(*key: int | str) -> int:
    """Return the 64-bit seed of the global generators; for an augmented view: (train.seed, epoch, sample, view)."""
    return _hash(":".join(map(str, key)), "little")


def shuffle_seed(seed: int) -> int:
    """Return the 32-bit seed of the order of samples, to which the loader adds the epoch.

    The seed is hashed, because otherwise epoch e + 1 of seed s would have the shuffle of epoch e of seed s + 1.
    """
    return _hash(str(seed), "little", size=4)


def partition_number(sample: str) -> int:
    """Return a 64-bit number for the name of a sample. Its partition is this number modulo the number of partitions."""
    return int.from_bytes(hashlib.sha256(f"{PARTITION} {sample}".encode()).digest()[:8], "big")


def _hash(text: str, order: Literal["big", "little"], size: int = 8) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), order)
