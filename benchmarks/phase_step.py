"""One phase's training step, put together as the trainer does it, on images in memory: no loader, no log."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from paired_timing import Contestant

from bigincubate.config import load_recipe
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.models import Partition, apply_masks, compile_blocks, draw_masks, find_drop_paths, set_drop_path_rates
from bigincubate.optim import make_optimizer
from bigincubate.planning.phases import make_plan, phase_model
from bigincubate.sharding import make_sharding
from bigincubate.tasks.image_classification.mixup import mix

RECIPE = """
name = "benchmark"
[model]
name = "{model}"
img_size = {img_size}
num_classes = {classes}
args = {{ {args} }}
[data]
train_samples = 50000
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
    "depth": 3,  # of a module; a meta module has one block
    "modules": 4,
    "batch": 8,
    "precision": "fp32",
    "clip": 0.0,
    "drop_path": 0.0,
    "threads": 0,
}


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
        return load_recipe(str(file))


def batch(settings: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random images and labels for every contestant."""
    generator = torch.Generator().manual_seed(0)
    size = settings["img_size"]
    images = torch.randn(settings["batch"], 3, size, size, generator=generator)
    labels = torch.randint(settings["classes"], (settings["batch"],), generator=generator)
    return images.to(device), labels.to(device)


def ours(settings: dict[str, Any], phase: Any, module: int | None, *, skip: bool, compiled: bool = False) -> Contestant:
    """The step of `bigincubate.training.trainer.Trainer` for this phase."""
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    loaded = recipe(settings, skip=skip, compiled=compiled)
    plan, env = make_plan(loaded), DistributedContext.detect()
    row = plan.row(phase, module)
    chosen = loaded.settings(phase)
    model = phase_model(row, chosen, plan.family)
    partition = Partition(plan.family, row.depths)
    set_drop_path_rates(model, partition, chosen.drop_path.ramp_over, chosen.drop_path.rate, plan.target, row.module)
    model = model.to(env.device).train()
    plan.family.choose_attention(model, env.device, settings["precision"])
    units = [block.path for block in partition.blocks()]
    if compiled:
        compile_blocks(model, units)
    sharding = make_sharding(chosen, env, 1)
    wrapped = sharding.prepare(model, units, lambda m: make_optimizer(m, chosen))
    images, labels = batch(settings, env.device)
    masked = len(find_drop_paths(model)) if chosen.drop_path.rate else 0
    state = {"step": 0}

    def forward() -> torch.Tensor:
        if masked:
            apply_masks(model, draw_masks(0, state["step"], masked, len(images)))
        mixed, targets = mix(
            images,
            labels,
            mixup=chosen.mixup,
            smoothing=chosen.loss.label_smoothing,
            num_classes=settings["classes"],
            seed=0,
            step=state["step"],
        )
        with torch.autocast(env.device.type, torch.bfloat16, enabled=settings["precision"] == "bf16"):
            return torch.nn.functional.cross_entropy(wrapped(mixed).float(), targets)

    def step() -> None:
        with sharding.gradient_sync(True):
            sharding.backward(forward())
        sharding.step(settings["clip"])
        state["step"] += 1

    return Contestant(step, forward, list(model.parameters()))
