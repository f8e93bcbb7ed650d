"""Identify the result of a phase by everything that determines it: resolved settings, data and input artifacts.

A result remains valid while these do not change. For example, modules stay valid when ``finetune.train.epochs``
changes, and a new key whose default keeps the old behavior changes no identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ..config import Phase, Recipe, Settings, is_execution
from ..models.drop_path import block_drop_path_rates
from ..models.partition import Partition
from ..storage.artifacts import Lineage
from .lineage import phase_inputs
from .phases import PhasePlan, Plan, Source
from .planned_row import PlannedRow

SCHEMA_VERSION = 1
# the identity has their resolved values instead: the number of steps, and the drop-path rate of each block
RESOLVED_KEYS = {"train.epochs", "train.max_steps", "drop_path.rate", "drop_path.ramp_over"}
# keys outside the settings of a phase that affect its result
ORDER_KEYS = ("data.shuffle", "data.canonical_nodes", "data.shuffle_block_size")
# keys that matter only in the decay of a warm-up-stable-decay schedule
DECAY_KEYS = {"schedule.decay", "schedule.decay_share", "schedule.min_lr"}
PHASE_KEYS: dict[Phase, tuple[str, ...]] = {
    "pretrain": ("meta.init", "meta.select"),
    "incubate": ("incubate.init", "incubate.boundary", "incubate.optimizer"),
    "end_to_end": ("end_to_end.init",),
}
SOURCE_KEYS: dict[Source, tuple[str, ...]] = {  # of phases that have modules from this source
    "module": ("incubate.optimizer",),
    "expand": ("expand.init", "expand.optimizer"),
}


def phase_identity(
    recipe: Recipe, plan: Plan, row: PhasePlan, planned: PlannedRow, weights: str | None = None
) -> dict[str, Any]:
    """Return what determines the result of a phase, apart from its data and the artifacts that it reads.

    Args:
        recipe: The recipe.
        plan: The plan of the run.
        row: The phase.
        planned: Its length, and its place in its learning-rate schedule.
        weights: What identifies the weights of ``finetune.init``, wherever they are; None if it is not set.

    Returns:
        JSON values by key: ``schema_version``, ``phase`` (its key, which the seed of the initial weights depends on),
        ``steps``, ``slots`` (depths and source of the modules, once for each run of equal modules), ``drop_path`` (the
        rate of each block that has one), ``schedule_start`` and ``schedule_total`` if the learning-rate schedule does
        not span the steps of the phase, ``finetune.init`` (the value of ``weights``) if the phase starts from a
        finished model, ``schedule_ends = "before_decay"`` if a warm-up-stable-decay schedule does not
        decay in the phase, and every identity key that the phase uses and whose value differs from the default.
    """
    settings = recipe.settings(row.phase)
    sources = [slot.source for slot in row.slots]
    start = [key for source, keys in SOURCE_KEYS.items() if source in sources for key in keys]
    keys = (*ORDER_KEYS, *PHASE_KEYS.get(row.phase, ()), *start, f"{row.phase}.export")
    values, defaults = recipe.flat(), Recipe(plan=recipe.plan).flat()
    used = {key: values[key] for key in keys if values.get(key) != defaults.get(key)}
    # random tensors have no optimizer state to keep
    if row.phase == "incubate" and recipe.incubate.init == "fresh":
        used.pop("incubate.optimizer", None)
    if recipe.expand.init == "fresh":
        used.pop("expand.optimizer", None)
    defaults = Settings().flat()
    for key, value in settings.flat().items():
        if value != defaults.get(key) and key not in RESOLVED_KEYS and not is_execution(key):
            used[key] = value
    if "finished" in sources:
        used["finetune.init"] = weights
    if planned.schedule_start:
        used["schedule_start"] = planned.schedule_start
    if planned.ends_before_decay:
        used = {key: value for key, value in used.items() if key not in DECAY_KEYS} | {"schedule_ends": "before_decay"}
    elif planned.schedule_total != planned.steps:
        used["schedule_total"] = planned.schedule_total
    return {
        "schema_version": SCHEMA_VERSION,
        "phase": row.key,
        "steps": planned.steps,
        "slots": [
            {"modules": len(list(equal)), "depths": list(slot.depths), "source": slot.source}
            for slot, equal in groupby(row.slots)
        ],
        "drop_path": _drop_path_rates(plan, row, settings),
        **used,
    }


def _drop_path_rates(plan: Plan, row: PhasePlan, settings: Settings) -> dict[str, float]:
    """Return the drop-path rate of each block by path, without blocks of rate 0."""
    drop = settings.drop_path
    if drop.rate == 0:
        return {}
    rates = block_drop_path_rates(
        Partition(plan.family, row.depths), drop.ramp_over, drop.rate, plan.target, row.module
    )
    return {path: rate for path, rate in rates.items() if rate > 0}


def phase_digest(identity: Mapping[str, Any], data_digest: str, inputs: Mapping[str, str]) -> str:
    """Return the SHA-256 (hexadecimal) of everything that the result of a phase depends on.

    Args:
        identity: The identity of the phase, from `phase_identity`.
        data_digest: Digest of the data that the phase trains on.
        inputs: Digests of the artifacts that it reads: ``{"meta": …}``, ``{"module/0": …, …}`` or empty.
    """
    text = json.dumps([identity, data_digest, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoint_digest(lineage: Lineage, stable_steps: int, step: int) -> str:
    """Return the digest that a resume checkpoint of a phase must have.

    Before the decay of a warm-up-stable-decay schedule, neither the length of the phase nor the decay matters, so
    phases that differ only in these share their checkpoints.

    Args:
        lineage: What the phase is trained from.
        stable_steps: Number of steps before the decay; see `PlannedRow`.
        step: Number of completed optimizer steps.
    """
    identity = lineage.identity
    if step <= stable_steps > 0:
        unused = DECAY_KEYS | {"steps", "schedule_total", "schedule_ends"}
        identity = {key: value for key, value in identity.items() if key not in unused}
    return phase_digest(identity, lineage.data, lineage.inputs)


def invalidated_rows(before: Sequence[PlannedRow], after: Sequence[PlannedRow]) -> list[PlannedRow]:
    """Return the phases whose results a changed recipe would invalidate.

    Args:
        before: The phases of a run, in the order in which they may start.
        after: The phases of the changed recipe.

    Returns:
        The rows of ``before`` that differ in ``after``, or that read the artifact of an invalidated phase. A phase that
        ``after`` does not have, such as a module that is no longer incubated, is not invalid for that reason.
    """
    now = {row.key: (row.identity, row.data) for row in after}
    invalid: dict[str, PlannedRow] = {}
    for row in before:
        reads = {source.key for source in phase_inputs(row.identity).values()}
        own = (row.identity, row.data)
        if now.get(row.key, own) != own or not reads.isdisjoint(invalid):
            invalid[row.key] = row
    return list(invalid.values())
