"""Check which packages, programs and devices of this machine bigincubate can use."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

# package -> (whether it is required, what it is used for)
PACKAGES = {
    "torch": (True, "training"),
    "torchvision": (True, "image transforms"),
    "timm": (True, "models, optimizers, schedules, augmentation"),
    "mosaicml-streaming": (True, "streaming data"),
    "safetensors": (True, "checkpoints and artifacts"),
    "tensorboard": (True, "curves"),
    "scikit-learn": (True, "the digits data set"),
    "transformers": (False, "language models: pip install 'bigincubate[text]'"),
    "tokenizers": (False, "tokenizers of language models: pip install 'bigincubate[text]'"),
    "matplotlib": (False, "figures of reports and comparisons: pip install 'bigincubate[report]'"),
    "deepspeed": (False, "ZeRO sharding: pip install 'bigincubate[deepspeed]'"),
    "fairscale": (False, "optimizer-state sharding: pip install 'bigincubate[fairscale]'"),
    "pyarrow": (False, "reading Parquet and Arrow files: pip install 'bigincubate[parquet]'"),
}
PROGRAMS = {"sbatch": "submit to Slurm", "g++": "train.compile on CPUs: every node needs it, even with a warm cache"}


def examine() -> Iterator[dict[str, Any]]:
    """Yield one entry per check, with ``name``, ``ok``, ``needed`` (required) and ``text``."""
    python = sys.version_info[:2]
    yield _check("python", python >= (3, 11), True, f"Python {sys.version.split()[0]} (3.11 or newer)")
    for name, (needed, purpose) in PACKAGES.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        yield _check(name, found is not None, needed, f"{name} {found or 'is not installed'} ({purpose})")
    with suppress(ImportError):  # missing torch is already reported above
        import torch

        count = torch.cuda.device_count()
        name = f"{count} x {torch.cuda.get_device_name(0)}" if count else "no CUDA device; training runs on the CPU"
        yield _check("gpu", count > 0, False, name)
    for name, purpose in PROGRAMS.items():
        path = shutil.which(name)
        yield _check(name, path is not None, False, f"{name}: {path or 'not found'} ({purpose})")
    if sys.platform.startswith("linux"):
        shm = shutil.disk_usage("/dev/shm").free
        text = f"/dev/shm has {shm // 2**20} MiB free (streaming needs 64 MiB)"
        yield _check("shm", shm > 64 * 2**20, True, text)


def _check(name: str, ok: bool, needed: bool, text: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "needed": needed, "text": text}
