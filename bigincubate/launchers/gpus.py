"""Which GPUs of this machine a phase uses, found without importing torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"


def list_visible_gpus() -> list[str]:
    """Return the GPUs that processes may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if (chosen := os.environ.get(GPU_VARIABLE)) is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(folder.iterdir())))] if folder.is_dir() else []


def choose_gpus(visible: list[str], in_use: Iterable[str], count: int) -> list[str]:
    """Return the ``count`` GPUs that the fewest running phases use, the first ones among equals.

    Args:
        visible: All GPUs.
        in_use: The GPUs of the running phases; a GPU that several of them use is listed several times.
        count: Number of ranks. With fewer GPUs than that all are returned, and the ranks report it.
    """
    uses = Counter(in_use)
    return sorted(sorted(visible, key=lambda gpu: uses[gpu])[:count], key=visible.index)
