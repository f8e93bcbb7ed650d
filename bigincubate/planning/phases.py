"""The phases of a recipe, one row of data for each, with sizes and costs.

==================== ============================= ======================= ===========
phase                depths of the model           weights it starts from  trainable
==================== ============================= ======================= ===========
``pretrain``         meta                          fresh, or `meta.init`   all
``incubate`` k       meta, module k at target      meta, module k by init  module k
``finetune``         target                        the K modules           all
``end_to_end``       target                        fresh                   all
==================== ============================= ======================= ===========

Costs are counted, not estimated: the model of each phase is built without storage and run forward and backward under
``torch.utils.flop_counter``, with the same parameters frozen as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..config import DataConfig, Phase, Recipe, Settings
from ..config.objects import load_object
from ..errors import ConfigError
from ..models import (
    Depths,
    ModelFamily,
    Partition,
    check_depths,
    check_model,
    default_meta_depths,
    find_balanced_cut,
    find_family,
    freeze_other_modules,
    normalize_depths,
)
from ..optim import trainable_param_info
from ..seeds import phase_key
from ..tasks.metric import Metric
from ..tasks.registry import make_task, task_class

Source = Literal["fresh", "meta", "module"]


@dataclass(frozen=True)
class Slot:
    """One module of the model that a phase trains: its blocks per stage, and where its weights come from."""

    depths: tuple[int, ...]
    source: Source


@dataclass(frozen=True)
class PhasePlan:
    """One row of the table above. ``module`` is the module that is trained; None: all are trained."""

    phase: Phase
    module: int | None
    slots: tuple[Slot, ...]

    @property
    def key(self) -> str:
        """The phase, with the number of the module that it trains, such as ``incubate/3``."""
        return phase_key(self.phase, self.module)

    @property
    def title(self) -> str:
        """The name of the phase in tables and messages."""
        titles = {"pretrain": "meta model", "finetune": "fine-tuning", "end_to_end": "end to end"}
        return titles.get(self.phase) or f"module {self.module}"

    @property
    def depths(self) -> Depths:
        """The depths of the model that the phase trains."""
        return tuple(slot.depths for slot in self.slots)


@dataclass(frozen=True)
class Plan:
    """How a recipe's model is cut, and its phases in the order in which they depend on each other."""

    family: ModelFamily
    target: Depths
    meta: Depths

    @property
    def modules(self) -> int:
        """The number of modules."""
        return len(self.target)

    def row(self, phase: Phase, module: int | None = None) -> PhasePlan:
        """Return a phase.

        Raises:
            ConfigError: ``incubate`` needs the number of a module; other phases take none.
        """
        everywhere = range(self.modules)
        if phase == "incubate":
            if module is None or module not in everywhere:
                raise ConfigError(f"--phase incubate needs --module 0 to {self.modules - 1}, or auto (given: {module})")
            slots = (Slot(self.target[k], "fresh") if k == module else Slot(self.meta[k], "meta") for k in everywhere)
        elif module is not None:
            raise ConfigError(f"--module goes with --phase incubate only, not with {phase}")
        else:
            depths = self.meta if phase == "pretrain" else self.target
            slots = (Slot(depths[k], "module" if phase == "finetune" else "fresh") for k in everywhere)
        return PhasePlan(phase, module, tuple(slots))

    def partial(self, joined: Collection[int]) -> PhasePlan:
        """Return a row that is only evaluated: the incubated modules ``joined``, and meta modules for the others."""
        slots = (
            Slot(self.target[k], "module") if k in joined else Slot(self.meta[k], "meta") for k in range(self.modules)
        )
        return PhasePlan("incubate", None, tuple(slots))

    def rows(self) -> list[PhasePlan]:
        """Return all phases; each needs only phases before it."""
        modules = [self.row("incubate", module) for module in range(self.modules)]
        return [self.row("pretrain"), *modules, self.row("finetune"), self.row("end_to_end")]


def _check_extensions(settings: Settings, data: DataConfig) -> None:
    """Load what a phase's settings name as ``package.module:attribute``, before anything is trained.

    Raises:
        ConfigError: A name cannot be loaded, or what it names does not support the settings.
    """
    make_task(settings, data)
    if ":" in (name := settings.optim.lr_scaling):
        load_object(name, key="optim.lr_scaling")


def make_plan(recipe: Recipe) -> Plan:
    """Decide how the recipe's model is cut, and check the settings of every phase.

    Raises:
        ConfigError: the model is not supported, or the depths do not fit it.
    """
    model, cut = recipe.model, recipe.plan
    family = find_family(model)
    own = family.default_depths(model)
    if cut.target_depths is not None:
        target = normalize_depths(cut.target_depths, family.stages, "plan.target_depths")
    else:
        assert cut.modules is not None
        if cut.modules > sum(own):
            raise ConfigError(f"plan.modules = {cut.modules}, but {model.name} has only {sum(own)} blocks")
        target = find_balanced_cut(family.count_block_flops(model, own), cut.modules, family.parity)
    if cut.meta_depths is not None:
        meta = normalize_depths(cut.meta_depths, family.stages, "plan.meta_depths")
    else:
        meta = default_meta_depths(target, family.parity)
    check_depths(family, target, meta)
    for phase in ("pretrain", "incubate", "finetune", "end_to_end"):
        settings = recipe.settings(phase)
        for key in ("library", "name"):
            if getattr(settings.model, key) != getattr(model, key):
                raise ConfigError(f"{phase}.model.{key} differs from model.{key}: a phase cannot change the model")
        _check_extensions(settings, recipe.data)
    return Plan(family, target, meta)


# ------------------------------------------------------------------------------------------------ costs


@dataclass(frozen=True)
class Cost:
    """Sizes and costs of a phase. A multiply-add counts as two FLOPs."""

    parameters: int
    trainable: int
    forward_flops: int  # a sample
    training_flops: int  # a sample: forward, activation gradients, weight gradients
    activation_bytes: int  # a sample: saved for the backward, fp32, fused attention
    optimizer_bytes: int  # gradients and optimizer state of the trainable parameters, fp32
    allreduce_bytes: int  # a step, fp32 gradients


def _convolution_backward_flops(
    grad_shape: list[int], x_shape: list[int], w_shape: list[int], *rest: Any, out_shape: Any, **_: Any
) -> int:
    """Count the FLOPs of each gradient as those of the forward: 2 · outputs · (inputs per group) · kernel."""
    output_mask = rest[-1]
    forward = 2 * math.prod(grad_shape) * math.prod(w_shape[1:])
    return forward * (bool(output_mask[0]) + bool(output_mask[1]))


# torch counts the weight gradient of a grouped convolution as if it were not grouped, which for the depthwise
# convolutions of ConvNeXt is too much by a factor of the number of channels
CORRECTIONS = {torch.ops.aten.convolution_backward: _convolution_backward_flops}


def phase_model(row: PhasePlan, settings: Settings, family: ModelFamily, *, device: str = "cpu") -> nn.Module:
    """Build the row's model with fresh weights, frozen as the row says.

    Raises:
        ConfigError: The model cannot be built, or its modules cannot be trained separately.
    """
    model = family.build(settings.model, row.depths, device=device)
    partition = Partition(family, row.depths)
    check_model(model, partition)
    freeze_other_modules(model, partition, row.module)
    if settings.train.subset_drop_path:
        family.use_subset_drop_path(model, partition)
    if settings.train.last_block_cls_only:
        family.compute_last_block_for_cls_token_only(model, partition)
    return model


def count_cost(row: PhasePlan, settings: Settings, plan: Plan) -> Cost:
    """Count the costs of a row without data, and without memory for weights or activations."""
    model = phase_model(row, settings, plan.family, device="meta").train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    inputs = plan.family.example_inputs(settings.model, 1, "meta")
    with FlopCounterMode(display=False, custom_mapping=CORRECTIONS) as counter:
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
    """Count the bytes that autograd keeps from the forward to the backward, without parameters, for one batch.

    The model runs on fake CPU tensors, so that the kernels chosen are those of a real device (fused attention).

    Args:
        model: A model, which may be on the meta device.
        inputs: A batch, of which only shape and dtype are used.
    """
    with FakeTensorMode():
        state = {
            name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
            for name, p in model.named_parameters()
        }
        state |= {name: torch.empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        held: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            held[storage._cdata] = storage
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = torch.func.functional_call(model, state, torch.empty(inputs.shape, dtype=inputs.dtype))
        total = sum(storage.nbytes() for key, storage in held.items() if key not in own)
        del output
        return total


@dataclass(frozen=True)
class PlannedRow:
    """A row with its cost and its length.

    Attributes:
        key: key of the phase.
        phase: the phase.
        module: the module that is trained; None: all are.
        title: name of the phase for tables.
        depths: blocks by module and stage.
        metrics: what the phase's task measures; the first is the headline.
        unit: what a sample is called.
        cost: what it costs.
        batch_size: samples of an optimizer step.
        steps: optimizer steps.
        epochs: passes over the training split.
        seen: samples of all steps, with every view of a sample counted.
        total_flops: training FLOPs of all steps.
    """

    key: str
    phase: Phase
    module: int | None
    title: str
    depths: list[list[int]]
    metrics: tuple[Metric, ...]
    unit: str
    cost: Cost
    batch_size: int
    steps: int
    epochs: float
    seen: int
    total_flops: int
    identity: dict[str, Any] = field(default_factory=dict)  # what is computed (`phase_identity`); empty: without a run
    data: str = ""  # digest of the data that the phase trains on; empty: without a run


def phase_steps(settings: Settings, samples: int) -> tuple[int, int]:
    """Return the number of optimizer steps of a phase, and of an epoch, for a training split of ``samples``.

    Raises:
        ConfigError: A batch needs more samples than there are.
    """
    per_epoch = samples // (settings.train.batch_size // settings.augment.repeated_aug)
    if per_epoch == 0:
        raise ConfigError(f"train.batch_size = {settings.train.batch_size} is more than the {samples} training samples")
    steps = round(settings.train.epochs * per_epoch)
    return steps if settings.train.max_steps is None else min(steps, settings.train.max_steps), per_epoch


def cost_plan(
    recipe: Recipe, plan: Plan, samples: int, on_row: Callable[[PhasePlan], None] = lambda row: None
) -> list[PlannedRow]:
    """Every row with its cost and length, for ``samples`` training samples."""
    rows: list[PlannedRow] = []
    for row in plan.rows():
        on_row(row)
        settings = recipe.settings(row.phase)
        task = task_class(settings.task.name)
        cost = count_cost(row, settings, plan)
        steps, per_epoch = phase_steps(settings, samples)
        if row.phase == "end_to_end" and recipe.end_to_end.budget == "equal_flops":
            budget = sum(planned.total_flops for planned in rows)
            steps = math.floor(budget / (cost.training_flops * settings.train.batch_size))
        seen = steps * settings.train.batch_size
        rows.append(
            PlannedRow(
                key=row.key,
                phase=row.phase,
                module=row.module,
                title=row.title,
                depths=[list(depths) for depths in row.depths],
                metrics=task.metrics,
                unit=task.unit,
                cost=cost,
                batch_size=settings.train.batch_size,
                steps=steps,
                epochs=round(steps / per_epoch, 4),
                seen=seen,
                total_flops=seen * cost.training_flops,
            )
        )
    return rows


def plan_json(recipe: Recipe, plan: Plan, rows: list[PlannedRow]) -> dict[str, Any]:
    """``plan.json``: the rows, and the sum against end-to-end training at the recipe's own end-to-end length."""
    baseline = next(row for row in rows if row.key == "end_to_end")
    incubation = sum(row.total_flops for row in rows if row.key != "end_to_end")
    fine = next(row for row in rows if row.key == "finetune")
    return {
        "recipe": recipe.name,
        "family": plan.family.name,
        "target_depths": [list(depths) for depths in plan.target],
        "meta_depths": [list(depths) for depths in plan.meta],
        "rows": [asdict(row) for row in rows],
        "incubation_flops": incubation,
        "end_to_end_flops": baseline.total_flops,
        "finetune_share": fine.total_flops / incubation if incubation else 0.0,
    }
