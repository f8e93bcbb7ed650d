"""Cost and length of each phase: parameters, FLOPs, memory and steps.

Costs are counted, not estimated: the model of each phase is built without storage, with the same frozen parameters as
in training, and runs a forward and a backward pass under ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..config import PHASES, Recipe, Settings
from ..data.epoch_layout import EpochLayout
from ..models.base import explain_argument_errors
from ..optim.schedule import Schedule
from ..optim.state_size import trainable_param_info
from ..tasks.registry import task_class
from .phases import PhasePlan, Plan, Slot, phase_model
from .planned_row import Cost, PlannedRow
from .schedules import plan_schedules


def _convolution_backward_flops(
    grad_shape: list[int], x_shape: list[int], w_shape: list[int], *rest: Any, out_shape: Any, **_: Any
) -> int:
    """Count 2 · outputs · (inputs per group) · kernel FLOPs for each gradient, as in the forward pass."""
    output_mask = rest[-1]
    forward = 2 * math.prod(grad_shape) * math.prod(w_shape[1:])
    return forward * (bool(output_mask[0]) + bool(output_mask[1]))


# torch ignores groups when it counts the weight gradient of a convolution; for the depthwise convolutions of ConvNeXt,
# its count is too large by a factor of the number of channels
CORRECTIONS = {torch.ops.aten.convolution_backward: _convolution_backward_flops}


def count_cost(row: PhasePlan, settings: Settings, plan: Plan) -> Cost:
    """Count the costs of a phase without data and without allocating weights or activations."""
    model = phase_model(row, settings, plan.family, device="meta").train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    inputs = plan.family.example_inputs(settings.model, 1, "meta")
    counting = FlopCounterMode(display=False, custom_mapping=CORRECTIONS)
    with explain_argument_errors(settings.model.name), counting as counter:
        loss = model(inputs).sum()
        forward = counter.get_total_flops()
        loss.backward()
    kept = trainable_param_info(model, settings)
    state = sum(tensor.state_bytes_per_element * math.prod(tensor.shape) + tensor.extra_state_bytes for tensor in kept)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=trainable,
        forward_flops=forward,
        training_flops=counter.get_total_flops(),
        activation_bytes=saved_bytes(model, inputs),
        optimizer_bytes=4 * trainable + state,
        allreduce_bytes=4 * trainable,
    )


def saved_bytes(model: nn.Module, inputs: torch.Tensor) -> int:
    """Count the bytes that autograd saves for the backward pass of one batch, without parameters.

    The model runs on fake CPU tensors, so that torch selects the kernels of a real device (fused attention).

    Args:
        model: A model; it may be on the meta device.
        inputs: A batch; only its shape and dtype are used.
    """
    with FakeTensorMode():
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        weights = {tensor.untyped_storage()._cdata for tensor in state.values()}
        saved: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = torch.func.functional_call(model, state, torch.empty(inputs.shape, dtype=inputs.dtype))
        total = sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
        del output
        return total


Runs = tuple[tuple[int, ...], ...]  # number of blocks per stage, before the trained module, in it, and after it

SHORTEST = 2  # a run keeps both ends: its first block may get no gradient of its input, its last may compute less


class CostCounter:
    """Count the costs of many phases with the same settings, each distinct block once.

    All blocks of a stage that have the same role (frozen before the trained module, trained, or frozen after it) cost
    the same, except for those at the ends of a run of such blocks. The cost of a phase is therefore an affine function
    of the length of each run, and the slopes are the same in all phases. Long runs are counted at two short lengths
    and extrapolated, which is exact if blocks do not depend on their index (`check_model`).

    Args:
        settings: Settings of the phases.
        plan: Their plan.
    """

    def __init__(self, settings: Settings, plan: Plan) -> None:
        self.settings, self.plan = settings, plan
        self._counted: dict[tuple[Runs, int | None], Cost] = {}
        self._slopes: dict[tuple[int, int], dict[str, int]] = {}  # by role (-1, 0 or 1) and stage

    def count(self, row: PhasePlan) -> Cost:
        """Return the cost of a phase; the same as `count_cost`."""
        runs, module = _merge_modules(row)
        step, trained = self.plan.family.parity, module or 0
        short = tuple(tuple(_shorten(depth, step) for depth in run) for run in runs)
        times = {
            (at, stage): (depth - short[at][stage]) // step
            for at, run in enumerate(runs)
            for stage, depth in enumerate(run)
            if depth > short[at][stage]
        }
        unknown = {place for place in times if (place[0] - trained, place[1]) not in self._slopes}
        longer = {(at, stage): _lengthen(short, at, stage, step) for at, stage in unknown}
        if _count_blocks(runs) < sum(map(_count_blocks, (short, *longer.values()))):
            return self._count_runs(row, runs, module)
        base = asdict(self._count_runs(row, short, module))
        for (at, stage), lengthened in longer.items():
            cost = asdict(self._count_runs(row, lengthened, module))
            self._slopes[at - trained, stage] = {name: cost[name] - base[name] for name in base}
        for (at, stage), factor in times.items():
            slope = self._slopes[at - trained, stage]
            base = {name: base[name] + factor * slope[name] for name in base}
        return Cost(**base)

    def _count_runs(self, row: PhasePlan, runs: Runs, module: int | None) -> Cost:
        if (runs, module) not in self._counted:
            slots = tuple(Slot(depths, "fresh") for depths in runs)
            counted = PhasePlan(row.phase, module, slots, boundary=row.boundary)
            self._counted[runs, module] = count_cost(counted, self.settings, self.plan)
        return self._counted[runs, module]


def _merge_modules(row: PhasePlan) -> tuple[Runs, int | None]:
    """Return the blocks per stage of the modules before, in and after the trained one, and its index among these."""
    if row.module is None:
        return (_sum_depths(row.depths),), None
    parts = row.depths[: row.module], row.depths[row.module : row.module + 1], row.depths[row.module + 1 :]
    return tuple(_sum_depths(part) for part in parts if part), min(row.module, 1)


def _count_blocks(runs: Runs) -> int:
    return sum(map(sum, runs))


def _sum_depths(depths: Runs) -> tuple[int, ...]:
    return tuple(map(sum, zip(*depths, strict=True)))


def _shorten(depth: int, step: int) -> int:
    """Return the shortest length from which ``depth`` can be extrapolated, or ``depth`` if that saves nothing."""
    return depth if depth <= SHORTEST + step else SHORTEST + (depth - SHORTEST) % step


def _lengthen(runs: Runs, at: int, stage: int, step: int) -> Runs:
    changed = [list(run) for run in runs]
    changed[at][stage] += step
    return tuple(map(tuple, changed))


def phase_steps(settings: Settings, samples: int) -> tuple[int, int]:
    """Return the numbers of optimizer steps of a phase and of an epoch, for a training split of ``samples`` samples.

    Raises:
        ConfigError: The batch size is larger than the training split.
    """
    layout = EpochLayout(samples, settings.train.batch_size, settings.augment.repeated_aug)
    layout.check()
    steps = round(settings.train.epochs * layout.steps)
    return steps if settings.train.max_steps is None else min(steps, settings.train.max_steps), layout.steps


def count_costs(recipe: Recipe, plan: Plan) -> dict[str, Cost]:
    """Return the cost of every phase by its key, including those of modules that the plan does not incubate."""
    for settings in {s.model.model_dump_json(): s for s in map(recipe.settings, PHASES)}.values():
        phase_model(plan.row("end_to_end"), settings, plan.family, device="meta")  # checks blocks at every index
    counters = {phase: CostCounter(recipe.settings(phase), plan) for phase in PHASES}
    return {row.key: counters[row.phase].count(row) for row in replace(plan, expanded=frozenset()).rows()}


def cost_plan(recipe: Recipe, plan: Plan, samples: int, costs: Mapping[str, Cost] | None = None) -> list[PlannedRow]:
    """Return every phase with its cost and length, for a training split of ``samples`` samples.

    Equal FLOPs are those of an incubation of all modules, even if the plan incubates only some of them: fine-tuning
    then also gets the FLOPs of the other modules. Lengths are rounded down to whole steps.

    Args:
        recipe: The recipe.
        plan: Its plan.
        samples: Number of samples of the training split.
        costs: The costs of the phases if they have been counted before (`count_costs`).

    Raises:
        ConfigError: The batch size is larger than the training split, or the learning rates of two phases do not fit
            together.
    """
    costs = count_costs(recipe, plan) if costs is None else costs
    rows: list[PlannedRow] = []
    incubation = omitted = 0  # FLOPs of an incubation of all modules, and of those that this plan does not incubate
    for row in replace(plan, expanded=frozenset()).rows():
        settings = recipe.settings(row.phase)
        task = task_class(settings.task.name)
        cost = costs[row.key]
        steps, per_epoch = phase_steps(settings, samples)
        schedule_steps = None
        if row.phase == "pretrain" and recipe.pretrain.handover == "before_decay":
            schedule_steps, steps = steps, Schedule.of(settings, steps, per_epoch).decay_start
        step_flops = cost.training_flops * settings.train.batch_size
        budget = None
        if row.phase == "end_to_end":
            budget = incubation if recipe.end_to_end.budget == "equal_flops" else None
        elif row.phase == "finetune" and recipe.finetune.budget == "equal_flops":
            budget = steps * step_flops + omitted
        incubation += steps * step_flops
        if row.module in plan.expanded:
            omitted += steps * step_flops
            continue
        if budget is not None:
            steps = budget // step_flops
        batch_units = settings.train.batch_size * task.sample_units(settings)
        rows.append(
            PlannedRow(
                key=row.key,
                phase=row.phase,
                module=row.module,
                title=row.title,
                metrics=task.metrics,
                unit=task.unit,
                cost=cost,
                batch_size=settings.train.batch_size,
                batch_units=batch_units,
                steps=steps,
                epochs=round(steps / per_epoch, 4),
                seen=steps * batch_units,
                total_flops=steps * step_flops,
                approximate_flops=task.approximate_flops(cost.parameters, steps * batch_units),
                unused_flops=None if budget is None else budget - steps * step_flops,
                schedule_steps=schedule_steps,
            )
        )
    return plan_schedules(recipe, rows, lambda settings: phase_steps(settings, samples)[1])


def plan_json(recipe: Recipe, plan: Plan, rows: list[PlannedRow]) -> dict[str, Any]:
    """Return the content of ``plan.json``: the rows, and the FLOPs of incubation and of end-to-end training."""
    flops = {row.key: row.total_flops for row in rows}
    incubation = sum(flops.values()) - flops["end_to_end"]
    return {
        "recipe": recipe.name,
        "family": plan.family.name,
        "target_depths": [list(depths) for depths in plan.target],
        "meta_depths": [list(depths) for depths in plan.meta],
        "rows": [asdict(row) for row in rows],
        "incubation_flops": incubation,
        "end_to_end_flops": flops["end_to_end"],
        "finetune_share": flops["finetune"] / incubation if incubation else 0.0,
    }
