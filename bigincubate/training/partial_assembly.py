"""Partial assembly: the finished modules, with the meta model's modules in place of the others, before fine-tuning.

Modules do not communicate. After a module has written its artifact, it reads the artifacts of the others from the run
directory. If two modules finish at the same time, at least one finds the other, and the last module finds all of them.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from ..errors import ArtifactError
from ..models.partition import Partition
from ..models.surgery import extract, insert
from ..planning.context import PhaseContext
from ..planning.lineage import expected_lineage
from ..planning.phases import phase_model
from ..storage.artifacts import check_lineage, load_artifact, verify_artifact


def finished_modules(context: PhaseContext) -> list[int]:
    """Return the finished modules: those whose artifact is valid and has the lineage that this run expects."""
    run = context.run
    found = []
    for module in range(context.plan.modules):
        with contextlib.suppress(ArtifactError):  # missing or damaged
            manifest = verify_artifact(run.phase("incubate", module).artifact)
            if check_lineage(manifest, expected_lineage(run, "incubate", module)) is None:
                found.append(module)
    return found


def build_partial_assembly(context: PhaseContext, joined: list[int]) -> nn.Module:
    """Build a model of the finished modules ``joined``, with the meta model's modules in place of the others.

    Each rank has the complete model on its device, even if the phase is sharded. The random state of the training does
    not change.

    Raises:
        ArtifactError: An artifact is damaged or missing.
    """
    run, family, settings = context.run, context.plan.family, context.settings
    row = context.plan.partial(joined)
    partition = Partition(family, row.depths)
    with torch.random.fork_rng(devices=[]):
        model = phase_model(row, settings, family)
    meta = family.adapt_state(load_artifact(run.phase("pretrain").artifact)[0], model)
    if others := [module for module, slot in enumerate(row.slots) if slot.source == "meta"]:
        insert(model, partition, extract(meta, context.meta_partition, *others), context.meta_partition)
    for module, slot in enumerate(row.slots):
        if slot.source == "module":
            tensors, _ = load_artifact(run.phase("incubate", module).artifact)
            insert(model, partition, tensors, context.target_partition)
    model.to(context.env.device)
    family.choose_attention(model, context.env.device, settings.train.precision)
    return model
