"""Partial assembly: the finished modules, with the meta model's modules in place of the others, before fine-tuning.

Modules do not communicate. After a module has written its artifact, it reads the artifacts of the others from the run
directory. If two modules finish at the same time, at least one finds the other, and the last module finds all of them.
"""

from __future__ import annotations

import contextlib
import logging

import torch
from torch import nn

from ..errors import ArtifactError, NonFiniteError
from ..models.partition import Partition
from ..models.surgery import extract, insert
from ..planning.context import PhaseContext
from ..planning.lineage import expected_lineage
from ..planning.phases import phase_model
from ..storage.artifacts import check_lineage, load_artifact, verify_artifact
from ..storage.lease import Lease
from ..tasks.base import EvalBatches
from ..tasks.metric import check_finite_metrics
from .metrics_writer import log_partial_assembly

logger = logging.getLogger(__name__)


def finished_modules(context: PhaseContext) -> list[int]:
    """Return the finished modules: those whose artifact is valid and has the lineage that this run expects."""
    run = context.run
    found = []
    for module in context.plan.incubated:
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


def score_partial_assembly(context: PhaseContext, stream: EvalBatches, lease: Lease, module: int) -> None:
    """Evaluate a module together with the other finished modules and the remaining meta modules.

    The metrics are written to ``partial.json``, to the events and to TensorBoard. Each rank builds the complete
    model and evaluates it on its part of the validation split.

    Args:
        context: The phase of the module.
        stream: This rank's part of the validation split.
        lease: Lease on the phase's folder.
        module: The module.
    """
    env, run, task = context.env, context.run, context.task
    joined: list[int] = env.broadcast(finished_modules(context) if env.is_main else None)
    if module not in joined:  # its meta model was replaced during training
        return
    model = build_partial_assembly(context, joined)
    scores = task.evaluate(model, stream, env)
    try:
        check_finite_metrics(task.metrics, scores, f"{context.row.title}, partly assembled")
    except NonFiniteError as error:  # the module itself is good
        logger.warning("%s", error)
        return
    result = task.make_result(scores)
    with env.main_process_first():
        if env.is_main:
            lease.check()
            context.folder.write_partial({"joined": joined, "modules": context.plan.modules, **result})
            folder = run.path / "partial" / context.folder.path.name
            log_partial_assembly(folder, len(joined), result["metrics"], task.metrics)
            run.log_event("partial_assembly", phase=context.row.key, joined=joined, metrics=result["metrics"])
