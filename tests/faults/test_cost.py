"""What hashing and fsync cost, as a share of a save: measured, not asserted."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ledger import Ledger
from parts import manager

from bigincubate.checkpoint.pieces import snapshot

MIB, SAVES = 256, 4


class NoHash:
    """Stands for SHA-256 where hashing shall cost nothing."""

    def update(self, data: Any) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 64


@pytest.mark.faults
@pytest.mark.row("cost")
def test_cost(ledger: Ledger, tmp_path: Path) -> None:
    tensors = {f"w{index}": torch.randn(2**20 // 4 * 16) for index in range(MIB // 16)}

    def save(name: str, *spoils: Callable[[pytest.MonkeyPatch], None]) -> float:
        """Seconds of the quickest of some saves."""
        times = []
        with pytest.MonkeyPatch.context() as patch:
            for spoil in spoils:
                spoil(patch)
            saves = manager(tmp_path / name)
            for step in range(SAVES):
                began = time.perf_counter()
                saves.save(step, tensors, {"step": step})
                times.append(time.perf_counter() - began)
        return min(times)

    def no_hash(patch: pytest.MonkeyPatch) -> None:
        original = hashlib.sha256
        patch.setattr(hashlib, "sha256", lambda *data: original(*data) if data else NoHash())

    def no_fsync(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(os, "fsync", lambda handle: None)

    for trial in ledger.trials():
        with ledger.keep(trial):
            whole, unhashed, unsynced = save("whole"), save("unhashed", no_hash), save("unsynced", no_fsync)
            began = time.perf_counter()
            snapshot(tensors)
            copied = time.perf_counter() - began
            figures = {
                "hashing, % of a save": 100 * (1 - unhashed / whole),
                "fsync, % of a save": 100 * (1 - unsynced / whole),
                "copy to host, % of a save": 100 * copied / whole,
                "MiB a second": MIB / whole,
            }
            trial.note(**{name: round(value, 1) for name, value in figures.items()})
    ledger.check()
