"""Start fine-tuning with the optimizer state of the meta model, for the tensors that are copied from it."""

from __future__ import annotations

from functools import partial

from ..errors import ArtifactError, format_command
from ..files import read_json
from ..models.surgery import find_copied_tensors
from ..planning.context import PhaseContext
from ..planning.identity import checkpoint_digest
from ..planning.planned_row import load_planned_rows
from ..sharding import Sharding
from ..storage.artifacts import Lineage
from ..storage.checkpoint_manager import Checkpoint, CheckpointManager
from ..storage.lease import Lease


def load_kept_state(context: PhaseContext, sharding: Sharding) -> None:
    """Load the optimizer state of the meta model if ``expand.optimizer`` is ``kept``. Must be called on all ranks.

    A tensor that is copied several times gives its state to every copy. All other tensors start without state, and so
    do copies whose shape differs from that in the meta model.

    Args:
        context: The phase; nothing is loaded if it makes no modules from the meta model.
        sharding: The phase's sharding strategy, with an optimizer without state.

    Raises:
        ArtifactError: The last checkpoint of the meta model is missing or damaged.
    """
    expanded = [module for module, slot in enumerate(context.row.slots) if slot.source == "expand"]
    if context.recipe.expand.optimizer != "kept" or not expanded:
        return
    checkpoint = _load_last_meta_checkpoint(context)
    copied = find_copied_tensors(
        sharding.trainable, context.partition, expanded, context.meta_partition, context.recipe.expand.init
    )
    sharding.load_optimizer_state(checkpoint.tensors, copied)


def _load_last_meta_checkpoint(context: PhaseContext) -> Checkpoint:
    """Return the checkpoint after the last step of the meta model.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    run, folder = context.run, context.run.phase("pretrain")
    stored = load_planned_rows((read_json(run.path / "plan.json") or {}).get("rows", []))
    meta = next(row for row in stored if row.phase == "pretrain")
    lineage = Lineage(meta.identity, meta.data, {})
    digest = partial(checkpoint_digest, lineage, meta.stable_steps)
    reader = CheckpointManager(folder.checkpoints, context.env, context.env, digest=digest, keep=2, lease=Lease())
    checkpoint = reader.load_latest()
    if checkpoint is None or checkpoint.step != meta.steps:
        train = format_command("train", run.recipe_file, "--run-dir", run.path, "--phase", "pretrain")
        raise ArtifactError(
            f'expand.optimizer = "kept" needs the checkpoint of step {meta.steps} in {folder.checkpoints}, which is'
            f' missing or damaged; use expand.optimizer = "fresh", or remove {folder.path} and train it with: {train}'
        )
    return checkpoint
