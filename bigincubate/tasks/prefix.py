"""What reaches a module from the frozen ones before it, computed once by all ranks, in place of in every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cluster.env import RunEnv, stderr
from ..data.dataset import DatasetInfo, Features, open_dataset
from ..data.features import FeatureMaker
from ..data.streams import Batch
from ..errors import Preempted
from ..models import check_deterministic, choose_attention, fit_positions, insert, reaching
from ..plan import cached_epochs, prefix_model
from ..rundir import RunDir
from .classification import ClassificationTask


def prefix_cache(
    task: ClassificationTask, run: RunDir, env: RunEnv, stopped: Callable[[], bool], *, steps: int, micro_batches: int
) -> DatasetInfo:
    """The rows for a module of ``incubate.prefix_cache``: those that are there, or new ones. On all ranks together.

    Args:
        steps: of the phase: no epoch is computed that it does not come to.
        micro_batches: those of a rank: as many samples as in one of them are computed at once, so that what they round
            to is what training would compute.

    Raises:
        Preempted: asked to stop; what is finished stays.
        ConfigError: something random lies before the module.
        EnvironmentFault: the disk has no room for them, or an image cannot be read.
    """
    row, settings, data = task.row, task.settings, task.data
    assert row.module is not None
    folders = [run.phase("incubate", module).features for module in range(task.plan.modules)]
    grown = {"recipe": task.recipe.digest, "data": data.digest, "meta": task.meta_digest(run)}
    maker = FeatureMaker(
        folder := folders.pop(row.module),
        data,
        settings,
        task.recipe.data,
        epochs=cached_epochs(settings, steps, data.samples["train"]),
        rows=settings.train.batch_size // settings.augment.repeats // env.world // micro_batches,
        grown={**grown, "module": str(row.module)},
    )
    if not env.broadcast(maker.done if env.is_main else None):
        compute = _compute(task, task.meta_model(run)[0], env.device)
        begun: Any = None
        with env.first():
            if env.is_main:
                features, chunks = maker.begin(compute, folders)
                begun = features.model_dump(), chunks
                run.note("prefix_cache_begun", phase=row.key, missing=len(chunks), **maker.size(features))
        described, chunks = env.broadcast(begun)
        features = Features.model_validate(described)
        making = maker.make(features, compute, chunks[env.rank :: env.world])
        for done in range(0, len(chunks), env.world):  # a chunk of each rank
            if any(env.any(stopped())):
                raise Preempted(f"{row.title}: stopped before what reaches it was computed; what there is stays")
            if env.is_main and done * 10 // len(chunks) > (done - env.world) * 10 // len(chunks):
                stderr(f"{row.title}: what reaches it: {done} of {len(chunks)} chunks")
            next(making, None)
        env.barrier()
        with env.first():
            if env.is_main:
                maker.finish(features)
                run.note("prefix_cached", phase=row.key, **maker.size(features))
    return open_dataset(folder)


def _compute(task: ClassificationTask, meta: dict[str, Tensor], device: torch.device) -> Callable[[Batch], Tensor]:
    settings, module = task.settings, task.row.begins
    with torch.random.fork_rng(devices=[]):
        model, partition = prefix_model(task.plan, settings)
    insert(model, partition, fit_positions(meta, model), task.meta)
    check_deterministic(model, partition, module)
    model.to(device)
    choose_attention(model, device, settings.train.precision)

    def compute(batch: Batch) -> Tensor:
        images, _ = task.prepare(batch.to(device), 0)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.train.precision == "bf16"):
            return reaching(model, partition, module, images)

    return compute
