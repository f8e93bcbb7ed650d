"""What each phase costs and how long it is: parameters, FLOPs, memory and steps.

Costs are counted, not estimated: each phase's model is built without storage and run forward and backward under
``torch.utils.flop_counter`` with the parameters frozen that training freezes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..config import Phase, Recipe, Settings
from ..data.epoch_layout import EpochLayout
from ..optim.state_size import trainable_param_info
from ..tasks.metric import Metric
from ..tasks.registry import task_class
from .phases import PhasePlan, Plan, phase_model


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
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
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
    layout = EpochLayout(samples, settings.train.batch_size, settings.augment.repeated_aug)
    layout.check()
    steps = round(settings.train.epochs * layout.steps)
    return steps if settings.train.max_steps is None else min(steps, settings.train.max_steps), layout.steps


def cost_plan(recipe: Recipe, plan: Plan, samples: int) -> list[PlannedRow]:
    """Return every row with its cost and length, for ``samples`` training samples."""
    rows: list[PlannedRow] = []
    for row in plan.rows():
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
