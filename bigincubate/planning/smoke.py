"""Any recipe at a size that two CPU cores finish in two minutes: what ``run --smoke`` lays over it.

What makes it this experiment stays: the family, the cut, the depths, the optimizer, the augmentations, the phases, and
larger images where fine-tuning has them. Narrow blocks, small images, few steps, and data that is made up.
"""

from __future__ import annotations

import re
from typing import Any

from ..config import PHASES, Recipe
from ..models import family_of

SAMPLES, CLASSES = 256, 10  # of the made-up training split
NARROW: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 32, "num_heads": 2},
    "swin": {"embed_dim": 8, "num_heads": [1, 2, 4, 8], "window_size": 2},
    "convnext": {"dims": [8, 16, 32, 64]},
    "mixer": {},  # timm's take no width
}


def smoke(recipe: Recipe) -> dict[str, Any]:
    """The tables of a recipe that make it small, each phase's own included."""
    model = recipe.model
    family = family_of(model.name)
    sizes = {phase: recipe.settings(phase).model.img_size for phase in PHASES}
    smallest = min(sizes.values())

    def small(img_size: int, batch: int, warmup: float) -> dict[str, dict[str, Any]]:
        grown = img_size > smallest
        if family.stages > 1:
            size = 64 if grown else 32  # the last stage has a 32nd of it
        else:
            patch = int(model.args.get("patch_size") or re.findall(r"patch(\d+)", model.name)[0])
            size = patch * (3 if grown else 2)
        return {
            "model": {"img_size": size, "num_classes": CLASSES},
            "train": {"batch_size": batch, "max_steps": 6, "micro_batch": batch},
            "schedule": {"warmup_epochs": min(warmup, 2 * batch / SAMPLES)},  # two steps
        }

    tables: dict[str, Any] = small(model.img_size, 16 * recipe.augment.repeated_aug, recipe.schedule.warmup_epochs)
    for phase in PHASES:
        settings = recipe.settings(phase)
        tables[phase] = small(sizes[phase], 16 * settings.augment.repeated_aug, settings.schedule.warmup_epochs)
    tables["meta"] = dict.fromkeys(("init", "select"))  # pretrained weights are wider
    tables["model"]["args"] = NARROW[family.name]
    made_up = {"source": "made-up", "train_samples": SAMPLES, "workers": 0}
    tables["data"] = {**made_up, **dict.fromkeys(("path", "remote", "local_cache"))}
    tables["log"], tables["checkpoint"] = {"every_steps": 2}, {"every_steps": 4}
    return tables
