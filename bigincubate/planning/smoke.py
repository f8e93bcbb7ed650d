"""Reduce any recipe so that two CPU cores can run it in two minutes, for ``run --smoke``.

Family, modules, depths, optimizer, augmentations and phases do not change; images of fine-tuning stay larger if they
were. Blocks are narrow, images small, steps few, and the data is generated.
"""

from __future__ import annotations

from typing import Any

from ..config import PHASES, Recipe, Settings
from ..errors import ConfigError


def smoke(recipe: Recipe) -> dict[str, Any]:
    """Return recipe tables that make a recipe small, including those of each phase.

    Raises:
        ConfigError: The recipe fine-tunes a finished model, which is not small.
    """
    if recipe.finetune.init is not None:
        raise ConfigError("--smoke trains a narrow model, and finetune.init is not one; omit --smoke or finetune.init")
    from ..models.library import find_family  # imports torch
    from ..tasks.registry import task_class

    family = find_family(recipe.model)
    source, samples = task_class(recipe.task.name).smoke_data()
    phases = {phase: recipe.settings(phase) for phase in PHASES}

    def input_size(settings: Settings) -> int:
        return family.example_inputs(settings.model, 1, "meta").numel()

    smallest = min(map(input_size, phases.values()))

    def small(settings: Settings) -> dict[str, dict[str, Any]]:
        batch = 16
        warmup = min(settings.schedule.warmup_epochs, 2 * batch / samples)  # two steps
        # repeated augmentation needs 256 samples, more than a partition of the generated data has
        augment = {"augment": {"repeated_aug": 1}} if recipe.data.decentralized else {}
        return {
            **augment,
            "model": family.smoke_overrides(settings.model, larger_inputs=input_size(settings) > smallest),
            "train": {"batch_size": batch, "max_steps": 6, "micro_batch": batch},
            "schedule": {"warmup_epochs": warmup},
        }

    tables: dict[str, Any] = small(recipe)
    tables |= {phase: small(settings) for phase, settings in phases.items()}
    tables["meta"] = dict.fromkeys(("init", "select"))  # pretrained weights are wider
    made_up = {"source": source, "workers": 0}
    tables["data"] = {**made_up, **dict.fromkeys(("path", "remote", "local_cache", "train_samples"))}
    tables["log"], tables["checkpoint"] = {"every_steps": 2}, {"every_steps": 4}
    return tables
