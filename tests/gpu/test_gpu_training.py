"""A phase on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def losses(bigincubate: Callable[..., Any], recipe: Path, run: Path, **environment: str) -> list[float]:
    """Return the training losses of the meta model, trained by the command line."""
    sets = ("--set", "train.max_steps=4", "--set", "log.every_steps=1")
    ended = bigincubate("train", recipe, "--run-dir", run, "--phase", "pretrain", *sets, env=environment)
    assert ended.returncode == 0, ended.stderr
    lines = map(json.loads, (run / "meta" / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_digits_phase_has_the_losses_of_the_cpu(bigincubate: Callable[..., Any], fast: Path, tmp_path: Path) -> None:
    on_gpu = losses(bigincubate, fast, tmp_path / "gpu")
    assert "CPU" not in json.loads((tmp_path / "gpu" / "meta" / "attempts" / "1.json").read_text())["device"]
    on_cpu = losses(bigincubate, fast, tmp_path / "cpu", CUDA_VISIBLE_DEVICES="")
    assert len(on_gpu) == 4
    assert on_gpu == pytest.approx(on_cpu, rel=1e-2)  # convolutions may use TF32 on a GPU
