"""What a phase reports while it runs: TensorBoard beside ``metrics.jsonl``, the same numbers in both."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from .files import append_line, read_lines, write_text
from .rundir import PhaseDir

FLEET = {"fleet/loss": "train/loss", "fleet/images_per_sec": "perf/images_per_sec"}


class Metrics:
    """One writer a phase, on rank 0; the other ranks' is silent.

    Args:
        first: the first optimizer step that will be logged. What an earlier attempt logged from it on is dropped, so
            that no step appears twice.
        fleet: a folder of this phase's own, beside those of all others: how far it is, under tags that they share.
        total: optimizer steps of the phase.
    """

    def __init__(
        self, folder: PhaseDir, first: int, *, enabled: bool, fleet: Path | None = None, total: int = 0
    ) -> None:
        self.file, self.total = folder.metrics, max(1, total)
        self.writer: SummaryWriter | None = None
        self.fleet: SummaryWriter | None = None
        if enabled:
            _cut(self.file, first)
            self.writer = _writer(folder.path / "tb", first)
            self.restarts = max(0, len(folder.attempts()) - 1)
            self.fleet = _writer(fleet, first) if fleet else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers of an optimizer step. Tags: ``train/loss``, ``train/lr``, ``train/grad_norm``, ``val/top1``, …"""
        if self.writer is None:
            return
        append_line(self.file, {"step": step, **values})
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        if self.fleet is not None:
            known = {name: values[tag] for name, tag in FLEET.items() if tag in values}
            known |= {"fleet/percent": 100 * step / self.total, "fleet/restarts": self.restarts}
            for tag, value in known.items():
                self.fleet.add_scalar(tag, value, step)

    def images(self, step: int, images: Tensor, mean: list[float], std: list[float]) -> None:
        """Show inputs ``[n, 3, H, W]`` as the model sees them, normalisation undone."""
        if self.writer is not None:
            shape = (1, 3, 1, 1)
            shown = images.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
            scale = max(1, 64 // shown.shape[-1])  # tiny images are enlarged to be seen
            shown = shown.clamp(0, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
            self.writer.add_images("inputs", shown, step)

    def text(self, tag: str, text: str) -> None:
        if self.writer is not None:
            self.writer.add_text(tag, text, 0)

    def flush(self) -> None:
        """Before a checkpoint: what it covers must not be lost with the process."""
        for writer in filter(None, (self.writer, self.fleet)):
            writer.flush()

    def close(self) -> None:
        for writer in filter(None, (self.writer, self.fleet)):
            writer.close()


def log_partial(folder: Path, modules: int, scores: dict[str, float]) -> None:
    """The score of an assembly of so many modules and the meta model, over that number, in a folder of its own."""
    with _writer(folder, 0) as writer:
        for key in ("top1", "loss"):
            writer.add_scalar(f"partial/{key}", scores[key], modules)


def _writer(folder: Path, first: int) -> SummaryWriter:
    if first == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(str(folder), purge_step=first)


def _cut(file: Path, first: int) -> None:
    rows = read_metrics(file)
    kept = [row for row in rows if row["step"] < first]
    if len(kept) < len(rows) or (file.exists() and not file.read_bytes().endswith(b"\n")):
        write_text(file, "".join(json.dumps(row) + "\n" for row in kept))


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The logged rows."""
    return read_lines(file)


class Meter:
    """Throughput between two logged steps."""

    def __init__(self, flops_per_image: int, device: torch.device) -> None:
        self.flops_per_image, self.device = flops_per_image, device
        self.peak = _peak_flops(device)
        self.restart()

    def restart(self) -> None:
        self.started, self.waited, self.images = time.perf_counter(), 0.0, 0

    def read(self) -> dict[str, float]:
        """Images a second over all ranks, GFLOP/s, share of time spent waiting for data, memory; then starts anew."""
        seconds = time.perf_counter() - self.started
        rate = self.images / seconds
        values = {
            "perf/images_per_sec": rate,
            "perf/gflops": rate * self.flops_per_image / 1e9,
            "perf/data_wait": self.waited / seconds,
        }
        if self.peak:
            values["perf/mfu"] = rate * self.flops_per_image / self.peak
        if self.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        else:
            import resource

            values["memory/peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.restart()
        return values


def _peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the accelerator (vendor data sheets); None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "V100": 112e12}
    return next((peak for key, peak in peaks.items() if key in name), None)
