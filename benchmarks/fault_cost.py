"""Measure the cost of hashing and fsync when a checkpoint is saved.

    python benchmarks/fault_cost.py [--mib 256] [--repeats 12] [--folder DIR]

Saves with and without each of them alternate; prints medians. Without fsync, a save may still be in memory when it
returns, and a power cut loses it. A second thread computes SHA-256 while the first one writes, so hashing takes time
only if it is slower than the disk or there is only one core. Training waits for neither, only for the copy to the
host.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bigincubate.distributed.process_group import DistributedContext
from bigincubate.storage.checkpoint_manager import CheckpointManager
from bigincubate.storage.sharded_tensors import copy_to_cpu


class NoHash:
    """A substitute for SHA-256 that does nothing."""

    def update(self, data: Any) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 64


def without_hash() -> Any:
    original = hashlib.sha256
    return patch.object(hashlib, "sha256", lambda *data: original(*data) if data else NoHash())


def without_fsync() -> Any:
    return patch.object(os, "fsync", lambda handle: None)


VARIANTS: dict[str, tuple[Callable[[], Any], ...]] = {
    "both": (),
    "no hash": (without_hash,),
    "no fsync": (without_fsync,),
    "neither": (without_hash, without_fsync),
}


def time_saves(folder: Path, mib: int, repeats: int) -> tuple[dict[str, float], float]:
    """Return the median seconds of a save for each variant, and of the copy to the host that training waits for."""
    tensors = {f"w{index}": torch.randn(2**18) for index in range(mib)}
    managers = {
        name: CheckpointManager.open(folder / name.replace(" ", "-"), DistributedContext(), digest="d" * 64)
        for name in VARIANTS
    }
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    copies = []
    for step in range(repeats + 1):
        for name, patches in VARIANTS.items():
            with ExitStack() as stack:
                for change in patches:
                    stack.enter_context(change())
                began = time.perf_counter()
                managers[name].save(step, tensors, {"step": step})
                seconds[name].append(time.perf_counter() - began)
        began = time.perf_counter()
        copy_to_cpu(tensors)
        copies.append(time.perf_counter() - began)
    # the first is a warm-up
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}, statistics.median(copies[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        medians, copied = time_saves(Path(folder), args.mib, args.repeats)
    total = medians["both"]
    print(f"{args.mib} MiB, {args.mib / total:.0f} MiB/s\n\n| | % of a save |\n| --- | ---: |")
    print(f"| hashing | {100 * (1 - medians['no hash'] / total):.1f} |")
    print(f"| fsync | {100 * (1 - medians['no fsync'] / total):.1f} |")
    print(f"| both | {100 * (1 - medians['neither'] / total):.1f} |")
    print(f"| copy to the host, which training waits for | {100 * copied / total:.1f} |")


if __name__ == "__main__":
    main()
