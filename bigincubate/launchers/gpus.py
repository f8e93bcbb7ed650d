"""Choose the GPUs of a phase on this machine, without importing torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"


def list_visible_gpus() -> list[str]:
    """Return the GPUs that processes may use, in the notation of ``CUDA_VISIBLE_DEVICES``."""
    if (chosen := os.environ.get(GPU_VARIABLE)) is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(folder.iterdir())))] if folder.is_dir() else []


def choose_gpus(visible: list[str], in_use: Iterable[str], count: int) -> list[str]:
    """Return the ``count`` GPUs that the fewest running phases use; ties are resolved in the order of ``visible``.

    Args:
        visible: All GPUs.
        in_use: The GPUs of the running phases; a GPU that several phases use is listed several times.
        count: Number of ranks. If there are fewer GPUs, all are returned, and the ranks report the error.
    """
    uses = Counter(in_use)
    return sorted(sorted(visible, key=lambda gpu: uses[gpu])[:count], key=visible.index)
