"""A shipped recipe on real photographs: `make test-full DATA=folder`, an unpacked CIFAR-100 image tree."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import Command

TREE = os.environ.get("BIGINCUBATE_CIFAR100")


@pytest.mark.full
@pytest.mark.skipif(not TREE, reason="needs CIFAR-100 as train/<class>/*, test/<class>/*: make test-full DATA=folder")
def test_cifar100_mini_is_ten_times_better_than_chance(tmp_path: Path, bigincubate: Command) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    # both cores are the run's
    prepared = bigincubate("data", "prepare", TREE, "--out", data)
    assert prepared.returncode == 0, prepared.stderr
    done = bigincubate("run", "cifar100-mini", "--run-dir", run, "--set", f"data.path={data}", timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finetune"]["samples"] == 10_000
    assert summary["finetune"]["metrics"]["top1"] >= 10
