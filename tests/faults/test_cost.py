"""What hashing and fsync cost, as a share of a save."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from parts import manager
from trial_log import TrialLog

from bigincubate.storage.sharded_tensors import copy_to_cpu

MIB, SAVES = 256, 12
Spoil = Callable[[pytest.MonkeyPatch], None]


class NoHash:
    """Stands for SHA-256 where hashing shall cost nothing."""

    def update(self, data: Any) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 64


@pytest.mark.faults
@pytest.mark.scenario("cost")
def test_cost_of_fault_tolerance(trial_log: TrialLog, tmp_path: Path) -> None:
    tensors = {f"w{index}": torch.randn(2**20 // 4 * 16) for index in range(MIB // 16)}

    def no_hash(patch: pytest.MonkeyPatch) -> None:
        original = hashlib.sha256
        patch.setattr(hashlib, "sha256", lambda *data: original(*data) if data else NoHash())

    def no_fsync(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(os, "fsync", lambda handle: None)

    ways: dict[str, tuple[Spoil, ...]] = {
        "whole": (),
        "unhashed": (no_hash,),
        "unsynced": (no_fsync,),
        "bare": (no_hash, no_fsync),
    }

    def save(way: str, step: int) -> float:
        """Seconds of one save."""
        with pytest.MonkeyPatch.context() as patch:
            for spoil in ways[way]:
                spoil(patch)
            began = time.perf_counter()
            managers[way].save(step, tensors, {"step": step})
            return time.perf_counter() - began

    for trial in trial_log.trials():
        with trial_log.keep(trial):
            managers = {way: manager(tmp_path / way) for way in ways}
            rounds = [{way: save(way, step) for way in ways} for step in range(SAVES)]  # in turn: the disk's moods
            whole, unhashed, unsynced, bare = (median(each[way] for each in rounds[1:]) for way in ways)
            began = time.perf_counter()
            copy_to_cpu(tensors)
            copied = time.perf_counter() - began
            figures = {
                "hashing, % of a save": 100 * (1 - unhashed / whole),
                "fsync, % of a save": 100 * (1 - unsynced / whole),
                "both, % of a save": 100 * (1 - bare / whole),
                "copy to host, % of a save": 100 * copied / whole,
                "MiB/s": MIB / whole,
            }
            trial.note(**{name: round(value, 1) for name, value in figures.items()})
            assert bare >= 0.9 * whole, f"{figures['both, % of a save']:.0f} % of a save"
    trial_log.check()
