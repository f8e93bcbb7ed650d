"""The phases of a plan as data: sizes, costs and lengths. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from ..config import Phase, Recipe
from ..config.seeds import phase_key
from ..files import read_json
from ..storage.record_types import is_plan
from ..storage.run_directory import RunDir
from ..tasks.metric import Metric, planned_metrics


@dataclass(frozen=True)
class Cost:
    """Sizes and costs of a phase. A multiply-add counts as two FLOPs.

    Attributes:
        parameters: Number of parameters.
        trainable: Number of trainable parameters.
        forward_flops: FLOPs of the forward pass per sample.
        training_flops: FLOPs per sample of the forward pass, activation gradients and weight gradients.
        activation_bytes: Bytes per sample saved for the backward pass, in fp32 with fused attention.
        optimizer_bytes: Bytes of fp32 gradients and optimizer state.
        allreduce_bytes: Bytes of fp32 gradients that are reduced per step.
    """

    parameters: int
    trainable: int
    forward_flops: int
    training_flops: int
    activation_bytes: int
    optimizer_bytes: int
    allreduce_bytes: int


@dataclass(frozen=True)
class PlannedRow:
    """A phase with its cost and length.

    Attributes:
        key: Key of the phase.
        phase: The phase.
        module: The module that is trained; None if all are.
        title: Name of the phase in tables.
        metrics: Metrics of the phase's task; the first is the headline.
        unit: Name of what the task counts, such as ``"images"`` or ``"tokens"``.
        cost: Its sizes and costs.
        batch_size: Number of samples per optimizer step.
        batch_units: Number of units per optimizer step; a sample may have several, such as the tokens of a window.
        steps: Number of optimizer steps.
        epochs: Number of passes over the training split.
        seen: Number of units in all steps; each view of a sample counts.
        total_flops: Training FLOPs of all steps.
        approximate_flops: The usual estimate of these FLOPs (`Task.approximate_flops`), if the task has one.
        unused_flops: FLOPs of the phase's budget that are not enough for another step; None if it has no budget.
        schedule_start: Step of the learning-rate schedule at which the phase begins.
        schedule_steps: Steps of the learning-rate schedule; None: those of the phase.
        stable_steps: Steps before the decay of a warm-up-stable-decay schedule; 0 for other schedules.
        identity: The settings that determine the result (`phase_identity`); empty outside of a run.
        data: Digest of the data that the phase trains on; empty outside of a run.
    """

    key: str
    phase: Phase
    module: int | None
    title: str
    metrics: tuple[Metric, ...]
    unit: str
    cost: Cost
    batch_size: int
    batch_units: int
    steps: int
    epochs: float
    seen: int
    total_flops: int
    approximate_flops: int | None = None
    unused_flops: int | None = None
    schedule_start: int = 0
    schedule_steps: int | None = None
    stable_steps: int = 0
    identity: dict[str, Any] = field(default_factory=dict)
    data: str = ""

    @property
    def schedule_total(self) -> int:
        """The number of steps of the learning-rate schedule."""
        return self.steps if self.schedule_steps is None else self.schedule_steps

    @property
    def ends_before_decay(self) -> bool:
        """Whether the schedule is warm-up-stable-decay, and the phase ends before the decay."""
        return 0 < self.steps == self.stable_steps


def load_planned_rows(stored: Sequence[dict[str, Any]]) -> list[PlannedRow]:
    """Return the phases in the ``rows`` of ``plan.json``."""
    return [PlannedRow(**{**row, "metrics": planned_metrics(row), "cost": Cost(**row["cost"])}) for row in stored]


def stored_plan(run: RunDir, recipe: Recipe) -> dict[str, Any] | None:
    """Return the content of a run's ``plan.json``, or None if it is missing, damaged, or the plan of another recipe."""
    stored = read_json(run.path / "plan.json")
    return stored if stored is not None and is_plan_of(stored, recipe) else None


def is_plan_of(stored: dict[str, Any], recipe: Recipe) -> bool:
    """Return whether the content of a ``plan.json`` is the complete plan of a recipe."""
    if stored.get("settings") != recipe.identity or not is_plan(stored):
        return False
    try:
        keys = [row.key for row in load_planned_rows(stored["rows"])]
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    meta = [] if recipe.finetune.init else ["pretrain"]
    expected = chain(meta, (phase_key("incubate", k) for k in recipe.incubated), ["finetune", "end_to_end"])
    return all(key == other for key, other in zip_longest(keys, expected))


def stored_rows(run: RunDir, recipe: Recipe) -> list[PlannedRow] | None:
    """Return the phases of a run from its ``plan.json``; None as for `stored_plan`."""
    stored = stored_plan(run, recipe)
    return None if stored is None else load_planned_rows(stored["rows"])
