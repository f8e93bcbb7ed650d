"""What identifies the result of a phase: the resolved facts that it is computed from, its data and its inputs.

A result remains valid as long as these are the same. So a changed ``finetune.train.epochs`` leaves modules valid, and a
new key of the schema whose default is the old behavior changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..config import Phase, Recipe, Settings, is_execution
from ..errors import ArtifactError
from ..files import read_json
from ..models.drop_path import find_drop_paths, set_drop_path_rates
from ..models.partition import Partition
from ..seeds import phase_key
from ..storage.artifacts import Lineage, load_manifest
from ..storage.run_directory import RunDir
from .cost import PlannedRow
from .phases import PhasePlan, Plan, phase_model

SCHEMA_VERSION = 1
# settings that are resolved here: as the number of steps, and as the rate of each block
RESOLVED_KEYS = {"train.epochs", "train.max_steps", "drop_path.rate", "drop_path.ramp_over"}
# keys outside a phase's settings that change what it computes
ORDER_KEYS = ("data.shuffle", "data.canonical_nodes", "data.shuffle_block_size")
PHASE_KEYS: dict[Phase, tuple[str, ...]] = {"pretrain": ("meta.init", "meta.select"), "incubate": ("incubate.init",)}


def phase_identity(recipe: Recipe, plan: Plan, row: PhasePlan, steps: int) -> dict[str, Any]:
    """Return the facts that determine what a phase computes, apart from its data and the artifacts that it reads.

    Args:
        recipe: The recipe.
        plan: How the model is cut.
        row: The phase.
        steps: Its number of optimizer steps.

    Returns:
        JSON values by key: ``schema_version``, ``phase`` (its key, which enters the seed of initial weights),
        ``steps``, ``slots`` (depths and source of each module), ``drop_path`` (the rate of each block that has one) and
        every identity key that the phase uses and whose value differs from the default.
    """
    settings = recipe.settings(row.phase)
    keys = (*ORDER_KEYS, *PHASE_KEYS.get(row.phase, ()), f"{row.phase}.export")
    values, defaults = recipe.flat(), Recipe(plan=recipe.plan).flat()
    used = {key: values[key] for key in keys if values.get(key) != defaults.get(key)}
    defaults = Settings().flat()
    for key, value in settings.flat().items():
        if value != defaults.get(key) and key not in RESOLVED_KEYS and not is_execution(key):
            used[key] = value
    return {
        "schema_version": SCHEMA_VERSION,
        "phase": row.key,
        "steps": steps,
        "slots": [{"depths": list(slot.depths), "source": slot.source} for slot in row.slots],
        "drop_path": _drop_path_rates(plan, row, settings),
        **used,
    }


def _drop_path_rates(plan: Plan, row: PhasePlan, settings: Settings) -> dict[str, float]:
    """Return the drop-path rate of each block, by its path; blocks without drop-path are left out."""
    drop = settings.drop_path
    if drop.rate == 0:
        return {}
    model, partition = phase_model(row, settings, plan.family, device="meta"), Partition(plan.family, row.depths)
    set_drop_path_rates(model, partition, drop.ramp_over, drop.rate, plan.target, row.module)
    drop_paths = {block.path: find_drop_paths(model.get_submodule(block.path)) for block in partition.blocks()}
    rates = {path: max((module.rate for module in modules), default=0.0) for path, modules in drop_paths.items()}
    return {path: rate for path, rate in rates.items() if rate > 0}


def phase_digest(identity: Mapping[str, Any], data_digest: str, inputs: Mapping[str, str]) -> str:
    """Return the SHA-256 (hexadecimal) of everything that the result of a phase depends on.

    Args:
        identity: The facts of the phase, as `phase_identity` returns them.
        data_digest: Digest of the data that the phase trains on.
        inputs: Digests of the artifacts that it reads: ``{"meta": …}``, ``{"module/0": …, …}`` or none.
    """
    text = json.dumps([identity, data_digest, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def invalidated_rows(before: Sequence[PlannedRow], after: Sequence[PlannedRow]) -> list[PlannedRow]:
    """Return the phases whose results are not those of a changed recipe.

    Args:
        before: The phases of a run, in the order in which they may start.
        after: The same for the changed recipe.

    Returns:
        The rows of ``before`` that compute something else in ``after``, or read the artifact of one that does.
    """
    now = {row.key: (row.identity, row.data) for row in after}
    invalid: dict[str, PlannedRow] = {}
    for row in before:
        reads = {source.key for source in phase_inputs(row.identity).values()}
        if now.get(row.key) != (row.identity, row.data) or not reads.isdisjoint(invalid):
            invalid[row.key] = row
    return list(invalid.values())


def expected_lineage(run: RunDir, phase: Phase, module: int | None = None) -> Lineage:
    """Return what the artifact of a phase must have been trained from to belong to this run as it is now.

    Raises:
        ArtifactError: The run has no such phase yet, or an artifact that the phase reads is missing or damaged.
    """
    rows = (read_json(run.path / "plan.json") or {}).get("rows", [])
    row = next((row for row in rows if row["key"] == phase_key(phase, module)), None)
    if row is None:
        raise ArtifactError(f"{phase_key(phase, module)} is not in the plan of {run.path}")
    inputs = {
        name: load_manifest(run.phase(source.phase, source.module).artifact).digest
        for name, source in phase_inputs(row["identity"]).items()
    }
    return Lineage(row["identity"], row["data"], inputs)


class PhaseInput(NamedTuple):
    """A phase whose artifact another phase reads."""

    phase: Phase
    module: int | None

    @property
    def key(self) -> str:
        """Return the key of the phase."""
        return phase_key(self.phase, self.module)


def phase_inputs(identity: Mapping[str, Any]) -> dict[str, PhaseInput]:
    """Return the phases whose artifacts a phase reads, by the names of the artifacts: ``meta``, ``module/0``."""
    inputs: dict[str, PhaseInput] = {}
    for module, slot in enumerate(identity["slots"]):
        if slot["source"] == "meta":
            inputs["meta"] = PhaseInput("pretrain", None)
        elif slot["source"] == "module":
            inputs[f"module/{module}"] = PhaseInput("incubate", module)
    return inputs
