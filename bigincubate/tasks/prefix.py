"""What reaches a module from the frozen ones before it, computed once by all ranks, in place of in every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checkpoint.store import load_artifact
from ..cluster.env import RunEnv
from ..data.dataset import DatasetInfo, open_dataset
from ..data.features import FeatureMaker
from ..data.streams import Batch
from ..errors import Preempted
from ..models import check_deterministic, choose_attention, fit_positions, insert, reaching
from ..plan import prefix_model
from ..rundir import RunDir
from .classification import ClassificationTask


def prefix_cache(
    task: ClassificationTask, run: RunDir, env: RunEnv, stopped: Callable[[], bool], micro_batches: int
) -> DatasetInfo:
    """The rows for a module of ``incubate.prefix_cache``: those that are there, or new ones. On all ranks together.

    Args:
        micro_batches: those of a rank: as many samples as in one of them are computed at once, and on the CPU in fp32
            that gives the very bits that training would compute.

    Raises:
        Preempted: asked to stop; what is finished stays.
        ConfigError: something random lies before the module.
        EnvironmentFault: the disk has no room for them, or an image cannot be read.
    """
    row, settings = task.row, task.settings
    assert row.module is not None
    meta, manifest = load_artifact(run.phase("pretrain").artifact)
    folder = run.phase("incubate", row.module).features
    rows = settings.train.batch_size // settings.augment.repeats // env.world // micro_batches
    grown = {"recipe": task.recipe.digest, "data": task.data.digest, "meta": manifest.digest, "module": str(row.module)}
    maker = FeatureMaker(folder, task.data, settings, task.recipe.data, rows=rows, grown=grown)
    compute = _compute(task, meta, env.device)
    with env.first():
        features = maker.begin(compute)
    if not maker.done:
        complete = maker.make(features, compute, stopped, rank=env.rank, world=env.world)
        if any(env.any(not complete)):
            raise Preempted(f"{row.title}: stopped before what reaches it was computed; what there is stays")
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
