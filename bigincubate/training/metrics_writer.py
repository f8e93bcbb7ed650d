"""Metrics of a running phase, written to TensorBoard, ``metrics.jsonl`` and the log."""

from __future__ import annotations

import json
import logging
import shutil
import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from ..compat.tensorboard import SummaryWriter
from ..files import append_json_line, write_text
from ..planning.planned_row import PlannedRow
from ..storage.run_directory import START_RATE, PhaseDir
from ..tasks.metric import Metric
from .chart_names import IMAGES, PARTIAL, WHOLE_RUN, name_chart, name_metric_chart

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Write the metrics of a phase.

    Args:
        file: The phase's ``metrics.jsonl``.
        writer: TensorBoard writer of the phase; if it is None, all methods do nothing.
        fleet: TensorBoard writer for the overview of all phases, where every phase uses the same charts.
        planned: The phase.
        restarts: Number of restarts of the phase.
    """

    def __init__(
        self,
        file: Path,
        writer: SummaryWriter | None = None,
        fleet: SummaryWriter | None = None,
        *,
        planned: PlannedRow,
        restarts: int = 0,
    ) -> None:
        self.file, self.writer, self.fleet = file, writer, fleet
        self.planned, self.restarts = planned, restarts
        rate = f"perf/{planned.unit}_per_sec"
        self.overview = {"train/loss": "loss", rate: f"{planned.unit} per second"}

    @classmethod
    def open(
        cls,
        folder: PhaseDir,
        first: int,
        planned: PlannedRow,
        *,
        enabled: bool,
        fleet: Path | None = None,
    ) -> MetricsWriter:
        """Open the logs of a phase.

        Args:
            folder: The phase's directory.
            first: The first optimizer step that will be logged. Later rows of earlier attempts are removed, so that no
                step appears twice.
            planned: The phase.
            enabled: Whether to write anything; True only on rank 0.
            fleet: Directory of the overview of all phases.
        """
        if not enabled:
            return cls(folder.metrics, planned=planned)
        _truncate(folder, first)
        return cls(
            folder.metrics,
            _writer(folder.path / "tb", first),
            _writer(fleet, first) if fleet else None,
            planned=planned,
            restarts=max(0, len(folder.read_attempts()) - 1),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the values of an optimizer step, by keys such as ``train/loss``, ``train/lr`` or ``perf/mfu``."""
        if self.writer is None:
            return
        append_json_line(self.file, {"step": step, **values})
        logger.info(describe_step(self.planned, step, values))
        for key, value in values.items():
            self.writer.add_scalar(name_chart(key, self.planned.metrics), value, step)
        if self.fleet is not None:
            overview = {name: values[key] for key, name in self.overview.items() if key in values}
            overview |= {"progress (%)": 100 * step / max(1, self.planned.steps), "restarts": self.restarts}
            for name, value in overview.items():
                self.fleet.add_scalar(f"{WHOLE_RUN}/{name}", value, step)

    def add_images(self, step: int, images: Tensor) -> None:
        """Write a batch of images ``[n, 3, H, W]`` with values in [0, 1] to TensorBoard."""
        if self.writer is not None:
            scale = max(1, 64 // images.shape[-1])  # enlarge small images
            self.writer.add_images(IMAGES, images.repeat_interleave(scale, 2).repeat_interleave(scale, 3), step)

    def add_text(self, tag: str, text: str, step: int = 0) -> None:
        """Write plain text to TensorBoard."""
        if self.writer is not None:
            self.writer.add_text(tag, textwrap.indent(text, "    "), step)  # TensorBoard reads Markdown

    def flush(self) -> None:
        """Write buffered values to disk, so that they are not lost if the process stops after a checkpoint."""
        for writer in filter(None, (self.writer, self.fleet)):
            writer.flush()

    def close(self) -> None:
        """Close the writers."""
        for writer in filter(None, (self.writer, self.fleet)):
            writer.close()


def describe_step(planned: PlannedRow, step: int, values: dict[str, float]) -> str:
    """Return the log line of an optimizer step: its metrics and the estimated time remaining.

    Args:
        planned: The phase.
        step: Number of completed optimizer steps.
        values: Metrics by tag; missing metrics are omitted.
    """
    rate = f"perf/{planned.unit}_per_sec"
    formats = {
        "train/loss": "loss {:.4f}",
        "train/grad_norm": "grad norm {:.3g}",
        "train/lr": "lr {:.3g}",
        rate: f"{{:.1f}} {planned.unit}/s",
        "perf/data_wait": "data wait {:.1%}",
        "memory/peak_gib": "memory {:.2f} GiB",
    }
    parts = [text.format(values[tag]) for tag, text in formats.items() if tag in values]
    for metric in planned.metrics:
        if (tag := f"val/{metric.name}") in values:
            parts.append(f"{metric.title} {metric.text(values[tag], unit=True)}")
    if values.get(rate):
        left = (planned.steps - step) * planned.batch_units / values[rate]
        parts.append(f"ETA {timedelta(seconds=round(left))}")
    return f"{planned.title}: step {step} of {planned.steps}, " + ", ".join(parts)


def log_partial_assembly(folder: Path, modules: int, values: dict[str, float], metrics: Sequence[Metric]) -> None:
    """Write the scores of a partial assembly with ``modules`` finished modules to TensorBoard."""
    with _writer(folder, 0) as writer:
        for name, value in values.items():
            writer.add_scalar(name_metric_chart(PARTIAL, name, metrics), value, modules)


def _writer(folder: Path, first: int) -> SummaryWriter:
    if first == 0:
        shutil.rmtree(folder, ignore_errors=True)
    # TensorBoard reads files in the order of their names, which start with the time in seconds. If two attempts started
    # within one second, the later file could be read first, and replaced steps would appear twice
    while any(file.name.split(".")[3] == f"{int(time.time()):010d}" for file in folder.glob("events.out.tfevents.*")):
        time.sleep(0.01)
    return SummaryWriter(str(folder), purge_step=first)


def _truncate(folder: PhaseDir, first: int) -> None:
    rows, file = folder.read_metrics(), folder.metrics
    kept = [row for row in rows if row["step"] < first]
    if len(kept) < len(rows) or (file.exists() and not file.read_bytes().endswith(b"\n")):
        write_text(file, "".join(json.dumps(row) + "\n" for row in kept))


class ThroughputMeter:
    """Measure throughput between two logged steps.

    Args:
        flops_per_unit: Training FLOPs per unit.
        unit: Name of what is counted, such as ``"images"``.
        device: The device that the model runs on.

    Attributes:
        waited: Seconds spent waiting for data.
        seen: Number of units of all ranks.
    """

    def __init__(self, flops_per_unit: float, unit: str, device: torch.device) -> None:
        self.flops_per_unit, self.unit, self.device = flops_per_unit, unit, device
        self.peak = _peak_flops(device)
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self.started, self.waited, self.seen = time.perf_counter(), 0.0, 0

    def read(self) -> dict[str, float]:
        """Return the metrics of the interval and start a new one.

        Returns:
            Units per second and GFLOP/s over all ranks, fraction of time spent waiting for data, peak memory in GiB
            and, if the peak FLOP/s of the accelerator is known, model FLOPs utilization.
        """
        seconds = time.perf_counter() - self.started
        rate = self.seen / seconds
        values = {
            f"perf/{self.unit}_per_sec": rate,
            "perf/gflops": rate * self.flops_per_unit / 1e9,
            "perf/data_wait": self.waited / seconds,
        }
        if self.peak:
            values["perf/mfu"] = rate * self.flops_per_unit / self.peak
        if self.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        else:
            import resource

            values["memory/peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.restart()
        return values


class StartRate:
    """Measure the rate of the first steps of an attempt and write it to ``start_rate.json``, for an early estimate.

    The first step is not counted, because it may include compilation. The host waits for the device twice.

    Args:
        folder: The phase's directory; None to do nothing.
        step_flops: FLOPs of an optimizer step of all ranks.
    """

    STEPS = 3

    def __init__(self, folder: PhaseDir | None, step_flops: int) -> None:
        self.folder, self.step_flops = folder, step_flops
        self.steps, self.started = 0, 0.0

    def finish_step(self, loss: Tensor) -> None:
        """Count a step with this loss. A file that cannot be written is ignored."""
        if self.folder is None or self.steps > self.STEPS:
            return
        if self.steps == 0:
            loss.item()
            self.started = time.perf_counter()
        elif self.steps == self.STEPS:
            loss.item()
            rate = self.STEPS * self.step_flops / (time.perf_counter() - self.started)
            with suppress(OSError):  # not synced to disk: only a launcher that runs now reads it
                (self.folder.path / START_RATE).write_text(json.dumps({"gflops": rate / 1e9}))
        self.steps += 1


def _peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of the accelerator in FLOP/s (vendor data sheets); None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "V100": 112e12}
    return next((peak for key, peak in peaks.items() if key in name), None)
