"""Split and sort samples in ways that depend only on their names and labels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .samples import Sample


def split_train_val(samples: list[Sample], fraction: float) -> dict[str, list[Sample]]:
    """Split samples into ``"train"`` and ``"val"``, which gets the last samples of each class.

    The validation split has ceil(n * fraction) samples. The number per class is in proportion to the size of the class,
    rounded by the largest-remainder method; then raised to one if it is zero and the class has several samples, and
    lowered if training would have none of the class.

    Args:
        samples: All samples, in an order that is unrelated to their content.
        fraction: Share of the samples to hold out, in [0, 1].
    """
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    total = math.ceil(len(samples) * fraction - 1e-9)
    quotas = {label: total * len(group) / len(samples) for label, group in by_class.items()}
    counts = {label: math.floor(quota) for label, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda label: counts[label] - quotas[label])
    for label in by_remainder[: total - sum(counts.values())]:
        counts[label] += 1
    if total:
        counts = {label: min(max(counts[label], 1), len(group) - 1) for label, group in by_class.items()}
    splits: dict[str, list[Sample]] = {"train": [], "val": []}
    for label, group in by_class.items():
        cut = len(group) - counts[label]
        splits["train"] += group[:cut]
        splits["val"] += group[cut:]
    return splits


def sort_by_name_hash(samples: Iterable[Sample]) -> list[Sample]:
    """Return the samples sorted by the hash of their names: a shuffle that does not depend on library versions."""
    return sorted(samples, key=lambda sample: hash_name(sample.name))


def hash_name(name: str) -> bytes:
    """Return the SHA-256 of a sample's name. The name of a file may have bytes that are not UTF-8."""
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()
