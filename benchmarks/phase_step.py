"""Run the trainer's step of one phase on images in memory, without loader and logs."""

from __future__ import annotations

import atexit
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

import torch
from paired_timing import Contestant

from bigincubate.config import load_recipe
from bigincubate.data.batch import Batch
from bigincubate.data.dataset import open_dataset
from bigincubate.data.prepare import prepare_dataset
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.distributed.signals import StopFlag
from bigincubate.planning.context import PhaseContext
from bigincubate.planning.cost import PlannedRow, count_cost
from bigincubate.planning.phases import make_plan
from bigincubate.storage.run_directory import RunDir
from bigincubate.training.determinism import deterministic_algorithms
from bigincubate.training.trainer import Trainer

RECIPE = """
name = "benchmark"
[model]
name = "{model}"
img_size = {img_size}
num_classes = {classes}
args = {{ {args} }}
[plan]
target_depths = {target}
meta_depths = {meta}
[train]
batch_size = {batch}
precision = "{precision}"
clip_grad = {clip}
compile = {compile}
subset_drop_path = {skip}
last_block_cls_only = {skip}
[loss]
label_smoothing = 0.1
[mixup]
mixup = 0.8
cutmix = 1.0
[drop_path]
rate = {drop_path}
ramp_over = "hybrid"
[sharding]
strategy = "none"
"""
DEFAULTS = {
    "model": "vit_base_patch16_224",
    "img_size": 224,
    "classes": 1000,
    "args": "",
    "depth": 3,  # blocks per module; a meta module has one block
    "modules": 4,
    "batch": 8,
    "precision": "fp32",
    "clip": 0.0,
    "drop_path": 0.0,
    "threads": 0,
    "data": None,  # a prepared folder with this number of classes; None: generated data
    "sets": [],  # additional recipe keys
}
STEPS = 1_000_000  # planned steps, for the schedule; the benchmark runs only a few


def recipe(settings: dict[str, Any], *, skip: bool, compiled: bool = False) -> Any:
    text = RECIPE.format(
        **settings,
        target=[settings["depth"]] * settings["modules"],
        meta=[1] * settings["modules"],
        skip=str(skip).lower(),
        compile=str(compiled).lower(),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.toml"
        file.write_text(text)
        return load_recipe(str(file), settings["sets"])


def batch(settings: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images and labels, the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    size = settings["img_size"]
    images = torch.randn(settings["batch"], 3, size, size, generator=generator)
    labels = torch.randint(settings["classes"], (settings["batch"],), generator=generator)
    return images.to(device), labels.to(device)


def make_data(folder: Path, classes: int, batch_size: int) -> Path:
    """Create a data set of tiny images, which is needed to build a phase but is not read."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    for split, each in (("train", -(-batch_size // classes)), ("val", 1)):
        for label in range(classes):
            made = folder / "images" / split / f"{label:05}"
            made.mkdir(parents=True)
            for number in range(each):
                (made / f"{number}.png").write_bytes(out.getvalue())
    prepare_dataset(str(folder / "images"), folder / "data")
    return folder / "data"


def temporary_folder() -> Path:
    """Create a folder that is removed when the process exits."""
    folder = Path(tempfile.mkdtemp(prefix="bigincubate-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def make_trainer(
    settings: dict[str, Any], phase: Any, module: int | None, *, skip: bool, compiled: bool = False
) -> tuple[Trainer, int]:
    """Return the trainer of a phase before its first step, and the training FLOPs per sample if nothing is skipped."""
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    loaded, folder = recipe(settings, skip=skip, compiled=compiled), temporary_folder()
    plan, env = make_plan(loaded), DistributedContext.detect()
    data = open_dataset(settings["data"] or make_data(folder, settings["classes"], settings["batch"]))
    run = RunDir(folder / "run")

    def context(phase: Any, module: int | None) -> PhaseContext:
        row, chosen = plan.row(phase, module), loaded.settings(phase)
        cost = count_cost(row, chosen, plan)
        seen = STEPS * chosen.train.batch_size
        planned = PlannedRow(
            key=row.key,
            phase=row.phase,
            module=row.module,
            title=row.title,
            metrics=(),
            unit="images",
            cost=cost,
            batch_size=chosen.train.batch_size,
            batch_units=chosen.train.batch_size,
            steps=STEPS,
            epochs=1.0,
            seen=seen,
            total_flops=seen * cost.training_flops,
        )
        return PhaseContext(loaded, plan, row, planned, run, data, env)

    if module is not None:  # a module needs a meta model; here it is not trained
        meta = Trainer.build(context("pretrain", None), StopFlag())
        meta.write_artifact(meta.folder, meta.sharding.full_state_dict(), "raw")
        meta.checkpoints.close()
        del meta
    trainer = Trainer.build(context(phase, module), StopFlag())
    trainer.wrapped.train()
    unskipped = recipe(settings, skip=False)
    flops = count_cost(plan.row(phase, module), unskipped.settings(phase), make_plan(unskipped)).training_flops
    return trainer, flops


def ours(settings: dict[str, Any], phase: Any, module: int | None, *, skip: bool, compiled: bool = False) -> Contestant:
    """Return a contestant that runs `bigincubate.training.trainer.Trainer.step` of this phase."""
    trainer, flops = make_trainer(settings, phase, module, skip=skip, compiled=compiled)
    images, labels = batch(settings, trainer.env.device)
    places = torch.arange(len(images))
    # the trainer selects masks by position on the host, so the positions stay there
    on_device = OnDevice({"images": images, "labels": labels}, places, places, places)

    # as in `Trainer.run`, but until the process exits
    deterministic_algorithms(trainer.env.device, trainer.settings.train.deterministic).__enter__()

    def forward() -> torch.Tensor:
        device, train = trainer.env.device, trainer.settings.train
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            return trainer.task.loss(trainer.wrapped, on_device, trainer.state.step)

    def step() -> None:
        trainer.step(on_device)
        trainer.state.step += 1

    return Contestant(step, forward, list(trainer.model.parameters()), flops)


class OnDevice(Batch):
    """A batch whose columns are already on the device."""

    def to(self, device: torch.device | str) -> Batch:
        return self
