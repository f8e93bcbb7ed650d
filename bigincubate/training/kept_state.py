"""Start a phase with the optimizer state of the phases from which its weights are copied."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..distributed.process_group import DistributedContext
from ..errors import ArtifactError, DamagedError, format_command
from ..models.partition import Partition, hybrid_depths
from ..models.surgery import find_copied_tensors
from ..planning.context import PhaseContext
from ..planning.identity import checkpoint_digest
from ..planning.lineage import PhaseInput, expected_lineage
from ..sharding import Sharding
from ..storage.checkpoint_manager import Checkpoint, CheckpointManager
from ..storage.lease import Lease
from ..storage.run_directory import RunDir

META = PhaseInput("pretrain", None)


class _KeptState(NamedTuple):
    """The optimizer state that a phase takes from another one: names of parameters there by name in this phase."""

    key: str  # the recipe key that asks for it
    source: PhaseInput
    names: dict[str, str]


def load_kept_state(context: PhaseContext, sharding: Sharding) -> None:
    """Load the optimizer state that ``incubate.optimizer`` and ``expand.optimizer`` keep. Must be called on all ranks.

    A tensor that is copied several times gives its state to every copy. All other tensors start without state, and so
    do copies whose shape differs from that in the phase that they come from.

    Args:
        context: The phase.
        sharding: The phase's sharding strategy, with an optimizer without state.

    Raises:
        ArtifactError: The last checkpoint of a phase that the state comes from is missing, damaged or stale.
        SystemResourceError: It cannot be read.
    """
    for kept in _find_kept_states(context, sharding.trainable):
        if kept.names:
            checkpoint = load_last_checkpoint(context.run, kept.source, kept.key, context.env)
            sharding.load_optimizer_state(checkpoint.tensors, kept.names)


def _find_kept_states(context: PhaseContext, names: dict[str, Any]) -> Iterator[_KeptState]:
    recipe, row, partition, meta = context.recipe, context.row, context.partition, context.meta_partition
    key = "incubate.optimizer"
    if recipe.expand.optimizer == "kept":
        modules = [module for module, slot in enumerate(row.slots) if slot.source == "expand"]
        copied = find_copied_tensors(names, partition, modules, meta, recipe.expand.init)
        yield _KeptState("expand.optimizer", META, copied)
    if recipe.incubate.optimizer == "kept" and row.module is not None:
        copied = find_copied_tensors(names, partition, [row.module], meta, recipe.incubate.init)
        yield _KeptState(key, META, copied)
    for module, slot in enumerate(row.slots if recipe.incubate.optimizer == "kept" else ()):
        if slot.source != "module":
            continue
        hybrid = Partition(partition.family, hybrid_depths(context.plan.target, context.plan.meta, module))
        copied = find_copied_tensors(names, partition, [module], hybrid, "grow")  # it has all blocks of the module
        untrained = {name for name in copied if recipe.incubate.boundary == "meta" and partition.is_boundary(name)}
        yield _KeptState(key, META, {name: name for name in untrained})
        trained = {name: source for name, source in copied.items() if name not in untrained}
        yield _KeptState(key, PhaseInput("incubate", module), trained)


def load_last_checkpoint(
    run: RunDir, source: PhaseInput, key: str, env: DistributedContext | None = None, folder: Path | None = None
) -> Checkpoint:
    """Return the checkpoint after the last step of a phase, whose optimizer state another phase keeps.

    Earlier checkpoints do not match the final weights, so they are never used.

    Args:
        run: The run.
        source: The phase.
        key: The recipe key that asks for the state, for messages.
        env: The ranks, which must all call this; None for a single process.
        folder: The folder of the checkpoints, if they were copied from another machine and are not in the run yet.

    Raises:
        ArtifactError: It is missing, damaged or stale.
        SystemResourceError: It cannot be read.
    """
    env, checkpoints = env or DistributedContext(), folder or run.phase(source.phase, source.module).checkpoints
    lineage = expected_lineage(run, source.phase, source.module)
    row = next(row for row in run.planned_rows if row["key"] == source.key)
    digest = partial(checkpoint_digest, lineage, row["stable_steps"])
    reader = CheckpointManager(checkpoints, env, env, digest=digest, keep=2, lease=Lease())
    module = () if source.module is None else ("--module", source.module)
    train = format_command("train", run.recipe_file, "--run-dir", run.path, "--phase", source.phase, *module)
    advice = f'use {key} = "fresh", or remove {checkpoints.parent} and train it with: {train}'
    if folder is not None:
        advice = "copy that folder again from the machine where the phase was trained"
    problem = "is missing"
    try:
        if (checkpoint := reader.load_step(row["steps"])) is not None:
            return checkpoint
    except DamagedError as error:
        problem = f"is damaged ({error})"
    except ArtifactError:
        problem = "was saved with other settings, data, meta model or modules"
        if folder is not None:
            advice = "train it from a bundle of this run"
    raise ArtifactError(
        f'{key} = "kept" needs the checkpoint of step {row["steps"]} in {checkpoints}, which {problem}; {advice}'
    )
