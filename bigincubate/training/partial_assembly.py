"""Do modules fit, before fine-tuning? A module and all others that are finished, the meta model for the rest, scored.

Modules do not talk to each other: each looks at what the run directory holds when it is finished itself. Its own
artifact is there before it looks, so of two that finish at the same time at least one sees the other, and the last of
all scores the assembled model.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from ..errors import ArtifactError
from ..files import read_json
from ..models import choose_attention, extract, fit_positions, insert
from ..models.partition import Partition
from ..planning.phases import phase_model
from ..storage.artifacts import check_origin, load_artifact, load_manifest, verify_artifact
from ..storage.run_directory import RunDir
from ..tasks.image_classification.task import ClassificationTask


def finished(task: ClassificationTask, run: RunDir) -> list[int]:
    """The modules that can be assembled now, by number: whole, and grown from this recipe, meta model and data."""
    made = read_json(run.path / "plan.json") or {}
    found = []
    for module in range(task.plan.modules):
        with contextlib.suppress(ArtifactError):  # not there yet, or damaged: not this module's concern
            manifest = verify_artifact(run.phase("incubate", module).artifact)
            meta = load_manifest(run.phase("pretrain").artifact).digest
            own = made["parts"][module] if made.get("parts") else made["data"]
            if check_origin(manifest, recipe=task.recipe.digest, meta=meta, data=own) is None:
                found.append(module)
    return found


def partial_assembly(task: ClassificationTask, run: RunDir, joined: list[int], device: torch.device) -> nn.Module:
    """The modules ``joined`` at their target's depth, the meta model's in place of the others; whole on this device,
    however the phase is spread over ranks. Draws from no random stream that anybody else reads.

    Raises:
        ArtifactError: an artifact is damaged or has gone.
    """
    row = task.plan.partial(joined)
    partition = Partition(task.plan.family, row.depths)
    with torch.random.fork_rng(devices=[]):
        model = phase_model(row, task.settings, task.plan.family)
    meta = fit_positions(load_artifact(run.phase("pretrain").artifact)[0], model)
    for module, slot in enumerate(row.slots):
        if slot.source == "meta":
            insert(model, partition, extract(meta, task.meta, module), task.meta)
        else:
            insert(model, partition, load_artifact(run.phase("incubate", module).artifact)[0], task.target)
    model.to(device)
    choose_attention(model, device, task.settings.train.precision)
    return model
