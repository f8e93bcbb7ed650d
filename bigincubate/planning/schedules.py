"""The place of each phase in its learning-rate schedule.

A phase spans all of its schedule, only the part before the decay, or a part of a schedule that it shares with another
phase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..config import Recipe, Settings
from ..errors import ConfigError
from ..optim.schedule import Schedule
from .planned_row import PlannedRow

# keys that a learning rate depends on, besides the table [schedule]
RATE_KEYS = {"train.lr", "train.batch_size", "augment.repeated_aug", "optim.lr_scaling", "optim.lr_base_batch"}


def plan_schedules(
    recipe: Recipe, rows: Sequence[PlannedRow], epoch_steps: Callable[[Settings], int]
) -> list[PlannedRow]:
    """Return the phases, each with its place in its schedule.

    With ``expand.schedule = "continue"``, the meta model and fine-tuning share one schedule over the steps of both.

    Args:
        recipe: The recipe.
        rows: All phases, with their lengths.
        epoch_steps: Returns the number of optimizer steps of an epoch, for the settings of a phase.

    Raises:
        ConfigError: Two phases should share a schedule, but their settings describe different ones.
    """
    shared = recipe.expand.schedule == "continue" and len(recipe.plan.incubated) < recipe.plan.number
    lengths = {row.phase: row.steps for row in rows if row.phase in ("pretrain", "finetune")}
    if shared:
        _check_shared_schedule(recipe, epoch_steps)
    placed = []
    for row in rows:
        if shared and row.phase in lengths:
            start = lengths["pretrain"] if row.phase == "finetune" else 0
            row = replace(row, schedule_start=start, schedule_steps=sum(lengths.values()))
        settings = recipe.settings(row.phase)
        if settings.schedule.name == "wsd":
            schedule = Schedule.of(settings, row.schedule_total, epoch_steps(settings), row.schedule_start)
            row = replace(row, stable_steps=min(row.steps, schedule.stable_steps))
        placed.append(row)
    return placed


def _check_shared_schedule(recipe: Recipe, epoch_steps: Callable[[Settings], int]) -> None:
    """Check that the settings of the meta model and of fine-tuning describe the same schedule.

    Raises:
        ConfigError: They do not; the message lists the keys that differ.
    """
    if recipe.pretrain.handover == "before_decay":
        raise ConfigError(
            'expand.schedule = "continue": fine-tuning continues the schedule of the meta model, so it has no decay of'
            " its own to omit; remove pretrain.handover"
        )
    meta, fine = recipe.settings("pretrain"), recipe.settings("finetune")
    if Schedule.of(meta, 1, epoch_steps(meta)) == Schedule.of(fine, 1, epoch_steps(fine)):
        return
    wanted, found = meta.flat(), fine.flat()
    keys = [key for key in wanted if (key in RATE_KEYS or key.startswith("schedule.")) and wanted[key] != found[key]]
    listed = ", ".join(f"finetune.{key} = {found[key]!r} (meta model: {wanted[key]!r})" for key in keys)
    raise ConfigError(
        f'expand.schedule = "continue": fine-tuning continues the learning rate of the meta model, but {listed};'
        " set the same values in both phases"
    )
