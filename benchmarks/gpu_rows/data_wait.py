"""Measure the fraction of time that the training loop waits for data, by the number of worker processes."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from gpu_rows import Line, Request

AUGMENT = ['augment.rand_augment="rand-m9-mstd0.5-inc1"', "augment.color_jitter=0.4", "augment.erase=0.25"]
CLASSES = 16


def make_class(folder: Path, label: int, each: int, size: tuple[int, int]) -> None:
    from loader import make_jpegs

    make_jpegs(folder / f"{label:02}", classes=1, each=each, size=size, coarse=40)


def make_photos(folder: Path, toy: bool) -> Path:
    """Create a data set of JPEGs of ImageNet's size, more than the loader keeps decoded in memory."""
    from bigincubate.data.prepare import prepare_dataset

    data = folder / "photos"
    if (data / "dataset.json").exists():
        return data
    shutil.rmtree(folder / "parts", ignore_errors=True)
    each, size = (4, (40, 30)) if toy else (80, (500, 375))
    with ProcessPoolExecutor(1 if toy else min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(make_class, *zip(*[(folder / "parts", n, each, size) for n in range(CLASSES)], strict=True)))
    for label in range(CLASSES):
        (folder / "images").mkdir(exist_ok=True)
        (folder / "parts" / f"{label:02}" / "0").rename(folder / "images" / f"{label:02}")
    prepare_dataset(str(folder / "images"), data)
    return data


def measure_workers(request: Request) -> list[Line]:
    from phase_step import DEFAULTS, make_trainer, temporary_folder

    sizes, lines = request.sizes, []
    data = make_photos(temporary_folder(), sizes.toy)
    for workers in (0, 1) if sizes.toy else (16, 8, 4, 1, 0):
        measured = 4 if sizes.toy or workers < 4 else 15  # one process takes seconds per batch
        settings = {**DEFAULTS, **sizes.model("B"), "classes": CLASSES, "data": str(data)}
        sets = [f"data.workers={workers}", f"log.every_steps={measured}", "log.images=0", *AUGMENT]
        trainer, _ = make_trainer({**settings, "sets": sets}, "incubate", 0, skip=False)
        trainer.metrics = trainer.open_metrics()
        rows: list[dict[str, Any]] = []
        trainer.log = rows.append  # type: ignore[method-assign,assignment]
        trainer.total = 2 * measured  # the first half is a warm-up
        with closing(trainer.parts.train_stream.batches(0)) as batches:
            trainer.loop(batches)
        found = trainer.state.last
        trainer.checkpoints.wait()
        trainer.metrics.close()
        trainer.checkpoints.close()
        line: Line = {"what": "ViT-B, module 0, JPEGs of 500x375", "workers": workers, "batch": settings["batch"]}
        line |= {"images/s": round(found["perf/images_per_sec"], 1), "waiting": found["perf/data_wait"]}
        lines.append(line)
        del trainer
    return lines
