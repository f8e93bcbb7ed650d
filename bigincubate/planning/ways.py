"""Compare the ways to train the target of a recipe: incubation, expansion, end-to-end training, the meta model alone.

There are as many workers as modules. *Separate* workers have no network between them: each trains a module, and one of
them trains everything else. *Connected* workers also share the batches of all other phases (data parallelism).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..config import Recipe
from ..errors import ConfigError
from .cost import cost_plan
from .memory import RankFootprint, batch_divisible, estimate_footprints
from .phases import Plan
from .planned_row import Cost, PlannedRow
from .walltime import ClusterSpec, critical_path_seconds, estimate_walltime


@dataclass(frozen=True)
class WayCost:
    """The cost of one way to train the target.

    Attributes:
        key: ``incubate`` (all modules), ``recipe`` (the modules that `plan.incubate` lists), ``expand``,
            ``end_to_end``, or ``meta`` (the meta model alone, with the FLOPs of an incubation of all modules).
        title: Name of the way in tables.
        workers: Number of workers, K.
        flops: Training FLOPs of all phases.
        separate_path_flops: FLOPs on the critical path of K separate workers.
        connected_path_flops: FLOPs on the critical path of K connected workers; None if they cannot share a batch.
        memory_before: Memory of the largest separate worker before the last phase, in bytes; 0 if there is one phase.
        memory_last: The same, in the last phase.
        sent_before: Bytes that each connected worker passes to collectives before the last phase; None if they cannot
            share a batch.
        sent_last: The same, in the last phase.
        gpu_seconds: Estimated GPU seconds on a cluster; None if no cluster is given.
        seconds: Estimated seconds on a cluster; None if no cluster is given.
    """

    key: str
    title: str
    workers: int
    flops: int
    separate_path_flops: int
    connected_path_flops: float | None
    memory_before: int
    memory_last: int
    sent_before: int | None
    sent_last: int | None
    gpu_seconds: float | None = None
    seconds: float | None = None


def compare_ways(
    recipe: Recipe, plan: Plan, samples: int, costs: Mapping[str, Cost], cluster: ClusterSpec | None = None
) -> list[WayCost]:
    """Return the cost of each way, for a training split of ``samples`` samples.

    Args:
        recipe: The recipe. Its end-to-end training has the length that `end_to_end.budget` gives it.
        plan: Its plan.
        samples: Number of samples of the training split.
        costs: The costs of its phases (`count_costs`).
        cluster: Cluster for which to estimate times; None for no estimate.

    Raises:
        ConfigError: The recipe fine-tunes a finished model.
    """
    if plan.finished:
        raise ConfigError(
            "--ways compares ways to train a new model, but finetune.init is a finished one; omit --ways, or"
            " finetune.init"
        )
    everything = frozenset(range(plan.modules))
    *incubation, baseline = cost_plan(recipe, replace(plan, expanded=frozenset()), samples, costs)
    expansion = cost_plan(recipe, replace(plan, expanded=everything), samples, costs)[:-1]
    ways = {"incubate": ("incubation", incubation)}
    if plan.expanded and plan.expanded != everything:
        some = ", ".join(map(str, plan.incubated))
        ways["recipe"] = (f"incubation of {some}", cost_plan(recipe, plan, samples, costs)[:-1])
    ways["expand"] = ("expansion", expansion)
    ways["end_to_end"] = ("end to end", [baseline])
    ways["meta"] = ("meta model alone", [_lengthen(incubation[0], sum(row.total_flops for row in incubation))])

    workers = [1, plan.modules] if _share_batches(recipe, plan.modules) else [1]
    rows = {row.key: row for row in (*incubation, baseline)}
    found = estimate_footprints(recipe, replace(plan, expanded=frozenset()), rows.values(), workers, ("ddp",))
    return [_count(key, title, phases, plan.modules, found, recipe, cluster) for key, (title, phases) in ways.items()]


def _lengthen(row: PlannedRow, flops: int) -> PlannedRow:
    """Return a phase with as many steps as fit into these FLOPs."""
    step = row.batch_size * row.cost.training_flops
    return replace(row, steps=flops // step, seen=flops // step * row.batch_units, total_flops=flops // step * step)


def _share_batches(recipe: Recipe, workers: int) -> bool:
    return all(batch_divisible(recipe.settings(phase), workers) for phase in ("pretrain", "finetune", "end_to_end"))


def _count(
    key: str,
    title: str,
    rows: Sequence[PlannedRow],
    workers: int,
    footprints: dict[str, list[RankFootprint]],
    recipe: Recipe,
    cluster: ClusterSpec | None,
) -> WayCost:
    """Return the cost of a way that consists of these phases, the last of which trains its final model."""
    modules = [row for row in rows if row.phase == "incubate"]
    others = [row for row in rows if row.phase != "incubate"]
    longest = max((row.total_flops for row in modules), default=0)
    whole = sum(row.total_flops for row in others)
    alone = {row.key: footprints[row.key][0].total for row in rows}
    sent = {row.key: row.steps * footprints[row.key][-1].sent for row in others}
    connected = len(footprints[rows[-1].key]) > 1
    before, last = [row.key for row in rows[:-1]], rows[-1].key
    estimates = []
    if cluster is not None:
        estimates = estimate_walltime(
            rows, cluster, lambda row, ranks: batch_divisible(recipe.settings(row.phase), ranks)
        )
    return WayCost(
        key=key,
        title=title,
        workers=workers,
        flops=whole + sum(row.total_flops for row in modules),
        separate_path_flops=whole + longest,
        connected_path_flops=whole / workers + longest if connected else None,
        memory_before=max((alone[phase] for phase in before), default=0),
        memory_last=alone[last],
        sent_before=sum(sent.get(phase, 0) for phase in before) if connected else None,
        sent_last=sent[last] if connected else None,
        gpu_seconds=sum(estimate.gpus * estimate.seconds for estimate in estimates) if cluster else None,
        seconds=critical_path_seconds(estimates, cluster.gpus) if cluster else None,
    )
