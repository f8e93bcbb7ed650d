"""The lengths of the phases of a trial, so that its counted training FLOPs are its budget.

A way consists of *stages*, one after the other. Every stage but the last gets its share of the budget, the last stage
gets all that is left; both are rounded down to whole optimizer steps. A stage may have several copies that are trained
in parallel: the modules, or K workers that train the whole model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

from bigincubate.config import Phase, Recipe
from bigincubate.data.epoch_layout import EpochLayout
from bigincubate.errors import ConfigError
from bigincubate.planning.cost import CostCounter
from bigincubate.planning.memory import RankFootprint, batch_divisible, estimate_footprints
from bigincubate.planning.phases import Plan, make_plan
from bigincubate.planning.planned_row import Cost, PlannedRow

from .definition import Kind, Measure, Settings, SplitName, Study, Way

STAGES: dict[Kind, tuple[tuple[str, Phase], ...]] = {
    "incubate": (("pretrain", "pretrain"), ("incubate", "incubate"), ("finetune", "finetune")),
    "expand": (("pretrain", "pretrain"), ("finetune", "finetune")),
    "end_to_end": (("end_to_end", "end_to_end"),),
    "meta_alone": (("pretrain", "pretrain"),),
    "expand_average": (("pretrain", "pretrain"), ("workers", "finetune"), ("finetune", "finetune")),
    "expand_best": (("pretrain", "pretrain"), ("workers", "finetune")),
}
"""The stages of each kind of way: the name, and the phase whose model and settings it has."""


@dataclass(frozen=True)
class Stage:
    """A stage of a trial.

    Attributes:
        name: ``pretrain``, ``incubate``, ``workers``, ``finetune`` or ``end_to_end``.
        phase: The phase whose model and settings it has.
        keys: The key of the phase of each copy that is trained in parallel.
        steps: Number of optimizer steps.
        step_flops: Training FLOPs of a step, for each copy.
    """

    name: str
    phase: Phase
    keys: tuple[str, ...]
    steps: int
    step_flops: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Return the training FLOPs of all copies."""
        return self.steps * sum(self.step_flops)

    @property
    def path_flops(self) -> int:
        """Return the training FLOPs of the largest copy."""
        return self.steps * max(self.step_flops)


@dataclass(frozen=True)
class TrialPlan:
    """The stages of a trial and the recipe changes from which they follow.

    Attributes:
        split: The split on which the models are trained.
        sets: All recipe changes but those of the split and the seed.
        stages: The stages, with the lengths that ``sets`` gives them.
        budget_flops: The budget, in FLOPs of its measure.
        used_flops: What the stages use of it.
    """

    split: SplitName
    sets: tuple[str, ...]
    stages: tuple[Stage, ...]
    budget_flops: int
    used_flops: int

    @property
    def flops(self) -> int:
        """Return all training FLOPs."""
        return sum(stage.flops for stage in self.stages)

    @property
    def path_flops(self) -> int:
        """Return the training FLOPs on the critical path of separate workers."""
        return sum(stage.path_flops for stage in self.stages)

    @property
    def remainder(self) -> float:
        """Return the unused share of the budget."""
        return (self.budget_flops - self.used_flops) / self.budget_flops


class Costs:
    """Costs of phases, counted when they are needed and once for equal models.

    Args:
        study: The study.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._counted: dict[str, dict[str, Cost]] = {}
        self._footprints: dict[str, dict[str, list[RankFootprint]]] = {}

    @cached_property
    def reference(self) -> dict[Measure, int]:
        """Return the FLOPs of budget 1: a TFLOP, or those of the recipe's own incubation on the validation split."""
        if self.study.unit == "TFLOP":
            return {"flops": 10**12, "path": 10**12}
        recipe = self.study.load_recipe("validation")
        stages = []
        for phase in ("pretrain", "incubate", "finetune"):
            per_step = self.step_flops(recipe, phase)
            steps = round(recipe.settings(phase).train.epochs * steps_per_epoch(recipe, phase))
            stages.append(Stage(phase, phase, (), steps, per_step))
        return {"flops": sum(s.flops for s in stages), "path": sum(s.path_flops for s in stages)}

    def step_flops(self, recipe: Recipe, phase: Phase) -> tuple[int, ...]:
        """Return the training FLOPs of a step of a phase, of every module for ``incubate``."""
        batch = recipe.settings(phase).train.batch_size
        return tuple(cost.training_flops * batch for cost in self.costs(recipe, phase).values())

    def footprints(self, recipe: Recipe, phases: Collection[Phase]) -> dict[str, list[RankFootprint]]:
        """Return memory and communication of some phases, for one rank, and for K ranks if they can share a batch."""
        found: dict[str, list[RankFootprint]] = {}
        for phase in phases:
            key = _shape(recipe, phase)
            if key not in self._footprints:
                settings, plan = recipe.settings(phase), _whole_plan(recipe)
                rows = [
                    PlannedRow(
                        key=name,
                        phase=phase,
                        title=name,
                        metrics=(),
                        unit="",
                        cost=cost,
                        module=module if phase == "incubate" else None,
                        batch_size=settings.train.batch_size,
                        batch_units=settings.train.batch_size,
                        steps=0,
                        epochs=0.0,
                        seen=0,
                        total_flops=0,
                    )
                    for module, (name, cost) in enumerate(self.costs(recipe, phase).items())
                ]
                ranks = [1, self.study.workers] if batch_divisible(settings, self.study.workers) else [1]
                self._footprints[key] = estimate_footprints(recipe, plan, rows, ranks, ("ddp",))
            found |= self._footprints[key]
        return found

    def costs(self, recipe: Recipe, phase: Phase) -> dict[str, Cost]:
        """Return the cost of a phase by its key, or those of all modules."""
        key = _shape(recipe, phase)
        if key not in self._counted:
            plan = _whole_plan(recipe)
            counter = CostCounter(recipe.settings(phase), plan)
            rows = [plan.row(phase, k) for k in range(plan.modules)] if phase == "incubate" else [plan.row(phase)]
            self._counted[key] = {row.key: counter.count(row) for row in rows}
        return self._counted[key]


def _whole_plan(recipe: Recipe) -> Plan:
    """Return the plan of a recipe in which all modules are incubated."""
    return replace(make_plan(recipe), expanded=frozenset())


def _shape(recipe: Recipe, phase: Phase) -> str:
    """Return a text that is equal for phases of equal cost."""
    settings = recipe.settings(phase)
    tables = [settings.model.model_dump(), settings.task.model_dump(), settings.optim.name]
    # the depth of the meta model matters to phases that contain it
    meta = recipe.plan.meta_depths if phase in ("pretrain", "incubate") else None
    return json.dumps([phase, recipe.plan.target_depths, meta, settings.train.batch_size, *tables])


def training_samples(recipe: Recipe) -> int:
    """Return the size of the training split that the recipe expects.

    Raises:
        ConfigError: The recipe does not say it.
    """
    if recipe.data.train_samples is None:
        raise ConfigError("data.train_samples is not set; set it in [splits], so that lengths are known without data")
    return recipe.data.train_samples


def steps_per_epoch(recipe: Recipe, phase: Phase) -> int:
    """Return the number of optimizer steps of an epoch."""
    settings = recipe.settings(phase)
    return EpochLayout(training_samples(recipe), settings.train.batch_size, settings.augment.repeated_aug).steps


def plan_trial(
    costs: Costs, way: Way, settings: Settings, budget: float, split: SplitName, *, limit_remainder: bool = True
) -> TrialPlan:
    """Compute the lengths of a trial's stages from its budget.

    Args:
        costs: Counted costs.
        way: The way to train the target.
        settings: The point of its search space.
        budget: The budget, in the unit of the study.
        split: The split on which the trial is evaluated.
        limit_remainder: Whether to refuse a budget of which too much remains unused.

    Raises:
        ConfigError: The shares leave nothing for the last stage, or too much of the budget remains unused.
    """
    study = costs.study
    # the best of K workers is chosen on images of the training split that none of them has seen
    trained: SplitName = "development" if way.kind == "expand_best" else split
    sets = [*way.sets, *settings_as_sets(study, way, settings)]
    recipe = study.load_recipe(trained, tuple(sets))
    total = left = math.floor(budget * costs.reference[way.measure])
    stages: list[Stage] = []
    *before, last = STAGES[way.kind]
    for name, phase in (*before, last):
        per_step = costs.step_flops(recipe, phase)
        if name == "workers":
            per_step = per_step * study.workers
        cost = max(per_step) if way.measure == "path" else sum(per_step)
        steps = (left if (name, phase) == last else math.floor(total * settings[f"share.{name}"])) // cost
        if steps < 1 or left < 0:
            raise ConfigError(f"{way.name}, budget {budget:g}: no FLOPs are left for {name} with {settings}")
        left -= steps * cost
        numbered = [f"incubate/{k}" for k in range(len(per_step))]
        keys = numbered if phase == "incubate" else [phase] * len(per_step)
        stages.append(Stage(name, phase, tuple(keys), steps, per_step))
    if limit_remainder and left > study.max_remainder * total:
        raise ConfigError(
            f"{way.name}, budget {budget:g}: {left / total:.2%} of the budget remain; use a larger budget"
        )
    # before the settings, which may change the warm-up
    lengths = [length_sets(study, recipe, stage.phase, stage.steps) for stage in stages if stage.name == stage.phase]
    sets = [*chain.from_iterable(lengths), *sets]
    if way.kind in ("expand", "expand_average", "expand_best"):
        sets += ['plan.incubate="none"', 'finetune.budget="epochs"']
    if way.kind == "end_to_end":
        sets.append('end_to_end.budget="epochs"')
    return TrialPlan(trained, tuple(sets), tuple(stages), total, total - left)


def length_sets(study: Study, recipe: Recipe, phase: Phase, steps: int) -> list[str]:
    """Return the recipe changes for the number of steps of a phase, and for its warm-up by the rule of the study."""
    epoch = steps_per_epoch(recipe, phase)
    warmup = min(study.warmup.epochs, study.warmup.share * steps / epoch)
    return [
        f"{phase}.train.max_steps={steps}",
        f"{phase}.train.epochs={steps // epoch + 1}",
        f"{phase}.schedule.warmup_epochs={warmup:.6g}",
    ]


def settings_as_sets(study: Study, way: Way, settings: Settings) -> list[str]:
    """Return the recipe changes of a point, without the lengths and `last.lr`, which no recipe key stands for."""
    space = study.ways[way.tuned_as].space if way.tuned_as else way.space
    sets: list[str] = []
    for name, value in settings.items():
        if name == "meta_depth":
            sets.append(f"plan.meta_depths={[value] * study.load_recipe('validation').plan.number}")
        elif name in space and (changes := space[name].sets):
            sets += changes[value]
        elif not name.startswith(("share.", "last.")):
            sets.append(f"{name}={json.dumps(value)}")
    return sets


def describe_cost(costs: Costs, way: Way, plan: TrialPlan) -> dict[str, Any]:
    """Return what a trial costs: FLOPs, critical paths, memory of a worker, and bytes that a worker sends.

    Separate workers have no network between them. Connected workers share the batches of each stage that is not
    parallel anyway (data parallelism); ways whose workers are separate by definition have no such values, apart from
    the weights that each worker of ``expand_average`` sends once.
    """
    study = costs.study
    recipe = study.load_recipe(plan.split, plan.sets)
    found = costs.footprints(recipe, {stage.phase for stage in plan.stages})
    *before, last = plan.stages
    separate = any(stage.name == "workers" for stage in plan.stages)
    connected = len(found[last.keys[0]]) > 1 and not separate
    sent = [0 if len(stage.keys) > 1 else stage.steps * found[stage.keys[0]][-1].sent for stage in plan.stages]
    return {
        "budget_flops": plan.budget_flops,
        "remainder": round(plan.remainder, 6),
        "flops": plan.flops,
        "path_flops": plan.path_flops,
        "connected_path_flops": round(
            sum(s.path_flops if len(s.keys) > 1 else s.flops / study.workers for s in plan.stages)
        )
        if connected
        else None,
        "memory_before": max((found[key][0].total for stage in before for key in stage.keys), default=0),
        "memory_last": max(found[key][0].total for key in last.keys),
        "sent_before": sum(sent[:-1]) if connected else found["finetune"][0].weights * (way.kind == "expand_average"),
        "sent_last": sent[-1] if connected else 0,
        "stages": [{key: value for key, value in asdict(s).items() if key in ("name", "steps")} for s in plan.stages],
    }


def worker_flops(costs: Costs, way: Way, budget: float) -> float:
    """Return the FLOPs to which a budget limits one worker, to find the nearest tuned budget."""
    return budget * costs.reference[way.measure]


def nearest_budget(costs: Costs, way: Way, budget: float, tuned: Way, budgets: Sequence[float]) -> float:
    """Return the tuned budget nearest to a budget on a logarithmic scale; of two at the same distance, the larger."""
    wanted = math.log(worker_flops(costs, way, budget))
    return min(budgets, key=lambda each: (round(abs(math.log(worker_flops(costs, tuned, each)) - wanted), 9), -each))
