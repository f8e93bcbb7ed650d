"""Prepare a run directory before training: find or prepare the data, and compute and store the plan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..config import PHASES, Recipe, differences
from ..data.dataset import DatasetInfo, describe_dataset, open_dataset
from ..data.file_locks import file_lock
from ..data.partitions import dataset_digest_for_module, partition_by_class
from ..errors import ConfigError, format_command
from ..files import quote_path, read_json, write_json
from ..storage.finished_models import describe_training, identify_weights
from ..storage.lease import acquire_lease_when_free
from ..storage.run_directory import RunDir
from ..tasks.registry import make_task
from .cost import cost_plan, plan_json
from .identity import invalidated_rows, phase_identity
from .phases import Plan, make_plan
from .planned_row import PlannedRow, is_plan_of, load_planned_rows

Report = Callable[[str], None]


def ensure_data(
    recipe: Recipe, run: RunDir, report: Report = lambda text: None, module: int | None = None
) -> DatasetInfo:
    """Open the run's data; prepare built-in data if it is missing.

    Args:
        recipe: The recipe.
        run: The run directory.
        report: Called with a message before slow work.
        module: Open the data only for this module; with decentralized data, only its partition has to be present.

    Raises:
        ConfigError: The run directory has built-in data of another source, and a phase has begun.
        DataError: The data is missing, or is not what the recipe expects.
    """
    path, modules = run.data_path(recipe), recipe.plan.number
    if recipe.data.path is None:
        _check_built_in_data(recipe, run, path)
    if recipe.data.source is not None and not (path / "dataset.json").exists():
        report(f"preparing {recipe.data.source} in {path}")
        divide = partial(partition_by_class, parts=modules) if recipe.data.decentralized else None
        make_task(recipe.settings("pretrain"), recipe.data).prepare_data(recipe.data.source, path, divide)
    only_partition = recipe.data.decentralized and module is not None
    data = (describe_dataset if only_partition else open_dataset)(path, recipe.data.remote)
    for module in recipe.incubated[-1:]:
        dataset_digest_for_module(recipe, data, module)  # raises an error if there are too few partitions
    for phase in PHASES:
        make_task(recipe.settings(phase), recipe.data).check_dataset(data)
    return data


def _check_built_in_data(recipe: Recipe, run: RunDir, path: Path) -> None:
    """Check that built-in data in the run directory is what the recipe uses; remove it if no phase has begun.

    Raises:
        ConfigError: It is not, and a phase has begun.
    """
    from ..data.prepare import DESCRIPTION, UNFINISHED

    marks = [path / DESCRIPTION, path / UNFINISHED]
    description = next((found for mark in marks if (found := read_json(mark))), {})
    source = description.get("source")
    if not isinstance(source, dict):
        return
    wanted = recipe.plan.number if recipe.data.decentralized else 0
    fits = source.get("kind") == recipe.data.source and ("parts" in source) == bool(wanted)
    if fits and len(description.get("parts", range(wanted))) == wanted:
        return
    if not run.begun:
        with file_lock(path.with_name(f".{path.name}.lock")):  # a process may be preparing it
            shutil.rmtree(path)
    elif source.get("kind") != recipe.data.source:
        raise ConfigError(
            f"data.source = {recipe.data.source!r}, but {path} has {source.get('kind')!r}; use another --run-dir, or"
            " the data.source that the run was created with"
        )


def ensure_plan(
    recipe: Recipe, run: RunDir, data: DatasetInfo, report: Report = lambda text: None
) -> tuple[Plan, list[PlannedRow]]:
    """Return the plan of a run, which is computed once per recipe and stored in ``plan.json``.

    The recipe replaces that of the run, unless this would invalidate a phase that has begun. Only one process at a
    time changes the recipe and the plan.

    Raises:
        ConfigError: A phase has begun, and the recipe would invalidate it or the run was created with other data.
    """
    file = run.path / "plan.json"
    plan, stored = make_plan(recipe), read_json(file) or None
    rows = _planned_rows(recipe, plan, data, stored)
    content = {**plan_json(recipe, plan, rows), "data": data.digest, "settings": recipe.identity}
    if _is_stored(content, stored, recipe) and run.has_recipe(recipe):
        return plan, rows
    with acquire_lease_when_free(run.path):
        stored, untrained = read_json(file) or None, not run.begun
        _check_change(recipe, run, data, rows, stored)
        if not _is_stored(content, stored, recipe):
            if recipe.finetune.init is not None:
                content["initial_weights"] = describe_training(recipe.finetune.init)
            write_json(file, content)
            try:  # a phase may have begun meanwhile; once it has its lease, it checks the plan
                _check_change(recipe, run, data, rows, stored)
            except ConfigError:
                write_json(file, stored) if stored else file.unlink()
                raise
        changed = run.update_recipe(recipe)
    if untrained and changed:
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        listed = "; ".join(changed[:5]) + more
        report(f"{run.path}: nothing has been trained here yet; replaced the older recipe ({listed})")
    return plan, rows


def check_plan_unchanged(run: RunDir, planned: PlannedRow) -> None:
    """Check that the run still has the plan with which a phase was set up. Call it with the lease of the phase.

    Raises:
        ConfigError: Another process has replaced the recipe of the run.
    """
    if _is_planned(run, planned):
        return
    with acquire_lease_when_free(run.path):  # the other process restores the plan if it finds the lease of the phase
        if not _is_planned(run, planned):
            raise ConfigError(
                f"{run.path}: another process replaced the recipe before {planned.title} was trained;"
                " use another --run-dir"
            )


def _is_planned(run: RunDir, planned: PlannedRow) -> bool:
    """Return whether ``plan.json`` has this phase, with this identity and data."""
    found: dict[str, Any] = next((row for row in run.planned_rows if row["key"] == planned.key), {})
    return (found.get("identity"), found.get("data")) == (planned.identity, planned.data)


def _is_stored(content: dict[str, Any], stored: dict[str, Any] | None, recipe: Recipe) -> bool:
    """Return whether ``plan.json`` is complete, and valid for the data and the identity keys of a recipe."""
    return stored is not None and stored.get("data") == content["data"] and is_plan_of(stored, recipe)


def _check_change(
    recipe: Recipe, run: RunDir, data: DatasetInfo, rows: list[PlannedRow], stored: dict[str, Any] | None
) -> None:
    """Check that neither the recipe nor the data would invalidate a phase that has begun.

    Raises:
        ConfigError: They would.
    """
    if not run.begun:
        return
    other = stored and stored.get("data")
    if isinstance(other, str) and other != data.digest:
        raise ConfigError(
            f"{quote_path(run.path)} was created with other data than {quote_path(data.path)}"
            f" (digest {other[:12]}…, now {data.digest[:12]}…); use another --run-dir, or the original data"
        )
    before = run.load_recipe()
    if changed := differences(before, recipe):
        invalid = invalidated_rows(_planned_rows(before, make_plan(before), data, stored), rows)
        begun = [row for row in rows if run.phase(row.phase, row.module).begun]
        if started := [row for row in invalid if run.phase(row.phase, row.module).begun]:
            folders = ", ".join(str(run.phase(row.phase, row.module).path) for row in started)
            remedies = f"use another --run-dir or the original settings, or remove {folders} to train again"
            if {row.key for row in begun} - {row.key for row in invalid}:
                fork = format_command("fork", run.path, "NEW_RUN", "--set", "KEY=VALUE")
                remedies = f"keep the other phases in a new run with: {fork}; or {remedies}"
            raise ConfigError(
                f"{run.path}: {'; '.join(changed)} would invalidate {', '.join(row.title for row in started)};"
                f" {remedies}"
            )


def _planned_rows(recipe: Recipe, plan: Plan, data: DatasetInfo, stored: dict[str, Any] | None) -> list[PlannedRow]:
    """Return the phases of a recipe, from ``plan.json`` if its identity keys are the same, and recomputed otherwise."""
    if stored is not None and stored.get("data") == data.digest and is_plan_of(stored, recipe):
        return load_planned_rows(stored["rows"])
    return count_rows(recipe, plan, data)


def count_rows(recipe: Recipe, plan: Plan, data: DatasetInfo) -> list[PlannedRow]:
    """Return the phases of a recipe with their costs, lengths and identities.

    Args:
        recipe: The recipe.
        plan: Its plan.
        data: The whole data set.

    Raises:
        ArtifactError: ``finetune.init`` is not a finished model.
    """
    weights = None if recipe.finetune.init is None else identify_weights(recipe.finetune.init)
    return [
        replace(
            row,
            identity=phase_identity(recipe, plan, plan.row(row.phase, row.module), row, weights),
            data=dataset_digest_for_module(recipe, data, row.module),
        )
        for row in cost_plan(recipe, plan, data.samples["train"])
    ]


def expected_samples(recipe: Recipe) -> int:
    """Return the number of training samples for planning: that of the data if it exists, or ``data.train_samples``.

    Raises:
        ConfigError: Neither exists.
        DataError: There is no data in ``data.path``, or it is damaged.
    """
    path, samples = recipe.data.path, recipe.data.train_samples
    if path is not None and (samples is None or (Path(path) / "dataset.json").exists()):
        return open_dataset(path, recipe.data.remote).samples["train"]
    if recipe.data.train_samples is None:
        prepare = format_command("data", "prepare", recipe.data.source or "SOURCE", "--out", "DIR")
        raise ConfigError(
            "the number of training samples is unknown: add --set data.train_samples=N, or --set data.path=DIR after"
            f" `{prepare}` (with --window N for text)"
        )
    return recipe.data.train_samples
