"""Build the components of a phase: model, sharding, optimizer, schedule, data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config.seeds import INIT, stable_seed
from ..data.micro_batches import count_micro_batches
from ..data.partitions import assert_partition_allowed
from ..errors import ArtifactError, format_command
from ..files import quote_path
from ..interchange.pretrained import pretrained_meta
from ..models.activation_checkpointing import checkpoint_activations
from ..models.base import Depths
from ..models.compilation import compile_blocks
from ..models.drop_path import find_drop_paths, set_drop_path_rates
from ..models.surgery import assemble, extract, initialize, insert, insert_boundary
from ..optim.ema import Ema
from ..optim.optimizer import make_optimizer
from ..optim.schedule import Schedule, make_schedule
from ..planning.context import PhaseContext
from ..planning.cost import phase_steps
from ..planning.identity import checkpoint_digest
from ..planning.lineage import expected_lineage
from ..planning.phases import phase_model
from ..sharding import Sharding, make_sharding
from ..storage.artifacts import (
    ArtifactManifest,
    Lineage,
    ModelSpec,
    check_artifact_lineage,
    load_artifact,
    load_manifest,
)
from ..storage.checkpoint_manager import CheckpointManager
from ..storage.finished_models import describe_weights
from ..storage.lease import Lease
from ..storage.run_directory import RunDir
from ..tasks.base import EvalBatches, Task, TrainBatches
from .finished_weights import finished_weights
from .hooks import LearningRateHook, apply_batch_source, make_learning_rate_hook


@dataclass
class PhaseComponents:
    """Components of a phase on one rank.

    Attributes:
        model: The model on its device.
        wrapped: The model wrapped by the sharding strategy.
        inputs: Digests of the artifacts that the phase reads: ``meta``, or ``module/0`` and so on.
        initial_weights: Weights from outside of the run that the phase or its inputs started from, if any.
        sharding: The sharding strategy.
        lr_hook: Hook that scales the learning rate of each step; None for a built-in rule.
        ema: Moving average of the trainable parameters.
        schedule: Learning rate by optimizer step.
        train_stream: Training batches.
        eval_stream: This rank's part of the validation split.
        steps_per_epoch: Optimizer steps per epoch.
        micro_batches: Number of micro-batches per rank and step.
        num_drop_paths: Number of drop-path modules that need masks; 0 if nothing is dropped.
    """

    model: nn.Module
    wrapped: nn.Module
    inputs: dict[str, str]
    initial_weights: str | None
    sharding: Sharding
    lr_hook: LearningRateHook | None
    ema: Ema
    schedule: Schedule
    train_stream: TrainBatches
    eval_stream: EvalBatches
    steps_per_epoch: int
    micro_batches: int
    num_drop_paths: int


def build_phase(context: PhaseContext, start: Mapping[str, Tensor] | None = None) -> PhaseComponents:
    """Build the components of a phase. Must be called on all ranks.

    The order is fixed: weights, freezing, drop-path, placement, activation checkpointing, compilation, sharding,
    optimizer.

    Args:
        context: The phase.
        start: See :func:`build_model`.

    Raises:
        ArtifactError: The artifact of an earlier phase is missing, stale or damaged.
        ConfigError: The settings are incompatible.
    """
    settings, env, task, family = context.settings, context.env, context.task, context.plan.family
    micro_batches = count_micro_batches(settings, env.world)
    assert_partition_allowed(context.recipe, context.data, context.row.module)  # before any sample is read
    model, inputs = build_model(context, start)
    drop, partition = settings.drop_path, context.partition
    set_drop_path_rates(model, partition, drop.ramp_over, drop.rate, context.plan.target, context.row.module)
    model = model.to(env.device)
    family.choose_attention(model, env.device, settings.train.precision)
    blocks = [block.path for block in partition.blocks()]
    checkpoint_activations(model, blocks, settings.sharding.activation_checkpointing)
    if settings.train.compile:
        compile_blocks(model, blocks)
    sharding = make_sharding(settings, env, micro_batches)
    lr_hook = make_learning_rate_hook(model, settings, sharding, env, micro_batches)
    wrapped = sharding.prepare(model, blocks, lambda built: make_optimizer(built, settings))
    _, steps_per_epoch = phase_steps(settings, context.data.epoch)
    planned = context.planned
    paths = find_drop_paths(model)
    return PhaseComponents(
        model=model,
        wrapped=wrapped,
        inputs={name: manifest.digest for name, manifest in inputs.items()},
        initial_weights=describe_initial_weights(context, inputs),
        sharding=sharding,
        lr_hook=lr_hook,
        ema=Ema(sharding.local_shards(), settings.ema.decay),
        schedule=make_schedule(settings, planned.schedule_total, steps_per_epoch, planned.schedule_start),
        eval_stream=task.eval_stream(context.data, "val", rank=env.rank, world=env.world),
        train_stream=apply_batch_source(task.train_stream(context.data, rank=env.rank, world=env.world), context),
        steps_per_epoch=steps_per_epoch,
        micro_batches=micro_batches,
        num_drop_paths=len(paths) if any(path.active for path in paths) else 0,
    )


def open_checkpoints(context: PhaseContext, inputs: dict[str, str], lease: Lease) -> CheckpointManager:
    """Open the resume checkpoints of a phase. Must be called on all ranks.

    Args:
        context: The phase.
        inputs: Digests of the artifacts that it reads.
        lease: Lease on its folder.
    """
    lineage, stable_steps = Lineage(context.planned.identity, context.data.digest, inputs), context.planned.stable_steps
    return CheckpointManager.open(
        context.folder.checkpoints,
        context.env,
        digest=partial(checkpoint_digest, lineage, stable_steps),
        keep=context.recipe.checkpoint.keep,
        lease=lease,
        kept_step=stable_steps,
    )


# ------------------------------------------------------------------------------------------------ the model


def build_model(
    context: PhaseContext, start: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, dict[str, ArtifactManifest]]:
    """Build the model of a phase with its initial weights; modules that the phase does not train are frozen.

    Args:
        context: The phase.
        start: Initial weights of the trained part that replace those of the phase: the tensors of a module under their
            names in the target, or all tensors of a model of the same depths.

    Returns:
        The model on the CPU, and the manifests of the artifacts that were read, by name.

    Raises:
        ArtifactError: The artifact of an earlier phase is missing, stale or damaged; the message has the command that
            creates it.
    """
    row, recipe, partition, family = context.row, context.recipe, context.partition, context.plan.family
    settings = context.settings
    torch.manual_seed(stable_seed(settings.train.seed, INIT, row.key))
    model = phase_model(row, settings, family)
    sources = {slot.source for slot in row.slots}
    inputs: dict[str, ArtifactManifest] = {}
    if not sources <= {"fresh", "finished"}:
        _require_meta_model(context.run)
    if sources & {"meta", "expand"}:
        meta, inputs["meta"] = load_artifact(context.run.phase("pretrain").artifact)
        meta = family.adapt_state(meta, model)
        if others := [module for module, slot in enumerate(row.slots) if slot.source == "meta"]:
            insert(model, partition, extract(meta, context.meta_partition, *others), context.meta_partition)
        if row.module is not None:
            initialize(model, partition, [row.module], meta, context.meta_partition, recipe.incubate.init)
        if row.boundary == "meta":
            insert_boundary(model, partition, meta, context.meta_partition)
        if expanded := [module for module, slot in enumerate(row.slots) if slot.source == "expand"]:
            initialize(model, partition, expanded, meta, context.meta_partition, recipe.expand.init)
    if "module" in sources:
        modules = _load_modules(context)
        inputs |= {f"module/{module}": manifest for module, (_, manifest) in modules.items()}
        # names only: adapt_state may change shapes
        names = list(extract(model.state_dict(), partition, *modules))
        assembled = assemble([tensors for tensors, _ in modules.values()], names)
        insert(model, partition, family.adapt_state(assembled, model), partition)
    if start is None and row.phase == "pretrain" and recipe.meta.init is not None:
        start = pretrained_meta(recipe.meta, settings.model, partition, model.state_dict())
    if start is None and "finished" in sources:
        start = finished_weights(context, model)
    if start is not None:
        source = partition if row.module is None else context.target_partition
        insert(model, partition, family.adapt_state(start, model), source)
    return model, inputs


def describe_initial_weights(context: PhaseContext, inputs: Mapping[str, ArtifactManifest]) -> str | None:
    """Return the weights from outside of the run that a phase starts from, itself or through its inputs.

    Args:
        context: The phase.
        inputs: Manifests of the artifacts that the phase reads.
    """
    if context.imported is not None:
        return context.imported
    if context.row.phase == "pretrain":
        return context.recipe.meta.init
    if (weights := context.planned.identity.get("finetune.init")) is not None:
        return describe_weights(str(context.recipe.finetune.init), weights)
    return ", ".join(dict.fromkeys(filter(None, (each.model.initial_weights for each in inputs.values())))) or None


def describe_model(
    task: Task, depths: Depths, *, records: dict[str, Any] | None = None, initial_weights: str | None = None
) -> ModelSpec:
    """Return the description of a model, for artifacts and exports.

    Args:
        task: The task that it is trained for.
        depths: Its depths.
        records: Properties of the records that it is trained on, such as the names of classes, if they are known.
        initial_weights: Pretrained weights that the training starts from, if any.
    """
    return ModelSpec(
        task=task.settings.task,
        model=task.settings.model,
        depths=[list(stages) for stages in depths],
        metadata=task.artifact_metadata(),
        records=records or {},
        initial_weights=initial_weights,
    )


def _require_meta_model(run: RunDir) -> None:
    """Check that the run has a meta model.

    Raises:
        ArtifactError: It is missing; the message has the command that creates it.
    """
    try:
        load_manifest(run.phase("pretrain").artifact)
    except ArtifactError:
        train = format_command("train", run.recipe_file, "--run-dir", run.path, "--phase", "pretrain")
        raise ArtifactError(f"the meta model is missing in {quote_path(run.path)}; train it with: {train}") from None


def _load_modules(context: PhaseContext) -> dict[int, tuple[dict[str, Tensor], ArtifactManifest]]:
    """Return the tensors and the manifest of every module that is incubated."""
    run = context.run
    folders = {module: run.phase("incubate", module).artifact for module in context.plan.incubated}
    problems = {
        module: problem
        for module, folder in folders.items()
        if (problem := check_artifact_lineage(folder, expected_lineage(run, "incubate", module)))
    }
    if problems:
        listed = "; ".join(f"module {module}: {problem}" for module, problem in problems.items())
        first = next(iter(problems))
        train = format_command(
            "train", run.recipe_file, "--run-dir", run.path, "--phase", "incubate", "--module", first
        )
        raise ArtifactError(
            f"cannot assemble: {listed}; remove {folders[first].parent} if it exists, then train it with: {train}"
        )
    return {module: load_artifact(folder) for module, folder in folders.items()}
