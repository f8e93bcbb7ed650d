"""Start fine-tuning with the weights of a finished model, which ``finetune.init`` names."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from ..errors import ArtifactError, ConfigError
from ..interchange.pretrained import pretrained_target
from ..interchange.pretrained_source import PretrainedSource
from ..planning.context import PhaseContext
from ..storage.finished_models import describe_weights, identify_weights

logger = logging.getLogger(__name__)


def finished_weights(context: PhaseContext, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the finished model, with those of ``model`` in place of a head that does not fit the data.

    Args:
        context: The phase.
        model: The model to fine-tune, with new random weights.

    Raises:
        ArtifactError: The weights are missing or damaged, or others than when the run was planned.
        ConfigError: The finished model has another architecture than the target, or does not fit the data.
        DataError: The weights cannot be downloaded.
        NonFiniteError: A weight is not finite.
    """
    init, planned = context.recipe.finetune.init, context.planned.identity["finetune.init"]
    assert init is not None
    source, found = PretrainedSource("finetune.init", init), identify_weights(init)
    if found != planned:
        raise ArtifactError(
            f"{source} has other weights (SHA-256 {found[:12]}…) than when this run was planned ({planned[:12]}…):"
            " restore them, or use another --run-dir"
        )
    fresh = model.state_dict()
    loaded = pretrained_target(source, context.settings.model, context.partition, fresh)
    tensors = context.plan.family.adapt_state(loaded.tensors, model)
    _check_tensors(source, tensors, fresh)
    if not context.task.keeps_head(loaded.records, context.data):
        tensors |= {name: fresh[name] for name in loaded.head}
    new = [name for name, tensor in tensors.items() if tensor is fresh[name]]
    logger.info(
        "fine-tuning starts from %s; new tensors: %s", describe_weights(init, planned), ", ".join(new) or "none"
    )
    return tensors


def _check_tensors(source: PretrainedSource, tensors: dict[str, Tensor], fresh: dict[str, Tensor]) -> None:
    """Check that a finished model has the tensors of the target.

    Raises:
        ConfigError: It does not; the message names a tensor that differs.
    """
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (tensors, fresh)]
    name = next(
        (name for name in sorted(shapes[0].keys() | shapes[1].keys()) if shapes[0].get(name) != shapes[1].get(name)), ""
    )
    if name:
        theirs, ours = (f"has {name} of the shape {own[name]}" if name in own else f"has no {name}" for own in shapes)
        raise ConfigError(
            f"{source} {theirs}, but the target {ours}: set model.name and model.args to those of the finished model"
        )
