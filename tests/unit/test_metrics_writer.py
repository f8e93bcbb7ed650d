"""What TensorBoard shows of a phase that was restarted."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bigincubate.compat.tensorboard import SummaryWriter
from bigincubate.storage.run_directory import PhaseDir
from bigincubate.tasks.metric import Metric
from bigincubate.training.chart_names import COMPUTING, IMAGES, NAMES, PARTIAL, WHOLE_RUN, name_chart
from bigincubate.training.metrics_writer import MetricsWriter


def test_attempts_within_a_second_show_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the number of the later process comes first in the order of texts."""
    planned: Any = SimpleNamespace(title="meta model", steps=6, unit="images", batch_size=8, metrics=())
    folder = PhaseDir(tmp_path)
    time.sleep(1 - time.time() % 1)  # a second begins
    for pid, first, steps in ((9999, 0, range(1, 6)), (10000, 4, range(4, 7))):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        writer = MetricsWriter.open(folder, first, planned, enabled=True, fleet=tmp_path / "fleet")
        for step in steps:
            writer.log(step, {"train/loss": float(pid)})
        writer.close()
    for shown, tag in ((tmp_path / "tb", "train/loss"), (tmp_path / "fleet", "whole run/loss")):
        scalars = EventAccumulator(str(shown)).Reload().Scalars(tag)
        assert [(event.step, event.value) for event in scalars] == [
            *((step, 9999.0) for step in (1, 2, 3)),
            *((step, 10000.0) for step in (4, 5, 6)),
        ]


def test_charts_of_training_and_validation_come_first() -> None:
    groups = {IMAGES.split("/")[0], WHOLE_RUN, PARTIAL, COMPUTING, *(name.split("/")[0] for name in NAMES.values())}
    assert sorted(groups | {"val"})[:2] == ["train", "val"]
    assert min(name for name in {*NAMES.values(), "train/loss"} if name.startswith("train/")) == "train/loss"
    assert all(len(name) <= 27 for name in NAMES.values())


def test_run_that_was_logged_under_other_names_is_continued(tmp_path: Path) -> None:
    planned: Any = SimpleNamespace(title="meta model", steps=6, unit="images", batch_units=8, metrics=())
    with SummaryWriter(str(tmp_path / "tb")) as earlier:
        for step in range(1, 6):
            earlier.add_scalar("perf/images_per_sec", 1.0, step)
    writer = MetricsWriter.open(PhaseDir(tmp_path), 4, planned, enabled=True)
    for step in range(4, 7):
        writer.log(step, {"perf/images_per_sec": 2.0})
    writer.close()
    shown = EventAccumulator(str(tmp_path / "tb")).Reload()
    steps = {name: [event.step for event in shown.Scalars(name)] for name in shown.Tags()["scalars"]}
    assert steps == {"perf/images_per_sec": [1, 2, 3], "work/images per second": [4, 5, 6]}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("val/bits_per_byte", "val/bits/byte"),
        ("val/accuracy", "val/next-token accuracy (%)"),
        ("val/unknown", "val/unknown"),
        ("perf/tokens_per_sec", "work/tokens per second"),
        ("train/new_value", "train/new value"),
        ("added/new_value", "work/new value"),
    ],
)
def test_chart_has_a_readable_name(key: str, name: str) -> None:
    metrics = (Metric("bits_per_byte", "bits/byte"), Metric("accuracy", "next-token accuracy", "%"))
    assert name_chart(key, metrics) == name
