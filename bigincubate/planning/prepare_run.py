"""Prepare a run directory before training: find or prepare the data, and compute and store the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..config import PHASES, Recipe, differences
from ..data.dataset import DatasetInfo, describe_dataset, open_dataset
from ..data.partitions import dataset_digest_for_module, partition_by_class
from ..errors import ConfigError
from ..files import read_json, write_json
from ..storage.run_directory import RunDir
from ..tasks.metric import planned_metrics
from ..tasks.registry import make_task
from .cost import Cost, PlannedRow, cost_plan, plan_json
from .identity import invalidated_rows, phase_identity
from .phases import Plan, make_plan

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
        ConfigError: The run directory has built-in data of another source.
        DataError: The data is missing, or is not what the recipe expects.
    """
    path, modules = run.data_path(recipe), recipe.plan.number
    source = (read_json(path / "dataset.json") or {}).get("source")
    if recipe.data.path is None and isinstance(source, dict) and source.get("kind") != recipe.data.source:
        raise ConfigError(
            f"data.source = {recipe.data.source!r}, but {path} has {source.get('kind')!r}; use another --run-dir, or"
            " the data.source that the run was created with"
        )
    if recipe.data.source is not None and not (path / "dataset.json").exists():
        from ..data.prepare import prepare_dataset

        report(f"preparing {recipe.data.source} in {path}")
        divide = partial(partition_by_class, parts=modules) if recipe.data.decentralized else None
        prepare_dataset(recipe.data.source, path, partition=divide)
    only_partition = recipe.data.decentralized and module is not None
    data = (describe_dataset if only_partition else open_dataset)(path, recipe.data.remote)
    dataset_digest_for_module(recipe, data, modules - 1)  # raises an error if there are too few partitions
    for phase in PHASES:
        make_task(recipe.settings(phase), recipe.data).check_dataset(data)
    return data


def ensure_plan(recipe: Recipe, run: RunDir, data: DatasetInfo) -> tuple[Plan, list[PlannedRow]]:
    """Return the plan of a run, which is computed once per recipe and stored in ``plan.json``.

    The recipe replaces that of the run, unless this would invalidate a phase that has started.

    Raises:
        ConfigError: The run was created with other data, or the recipe would invalidate a phase that has started.
    """
    file = run.path / "plan.json"
    stored = read_json(file) or None
    if stored is not None and stored["data"] != data.digest:
        raise ConfigError(
            f"{run.path} was created with other data than {data.path} (digest {stored['data'][:12]}…, now"
            f" {data.digest[:12]}…); use another --run-dir, or the original data"
        )
    plan = make_plan(recipe)
    rows = _planned_rows(recipe, plan, data, stored)
    before = run.load_recipe()
    if changed := differences(before, recipe):
        invalid = invalidated_rows(_planned_rows(before, make_plan(before), data, stored), rows)
        if started := [row for row in invalid if run.phase(row.phase, row.module).begun]:
            folders = ", ".join(str(run.phase(row.phase, row.module).path) for row in started)
            raise ConfigError(
                f"{run.path}: {'; '.join(changed)} would invalidate {', '.join(row.title for row in started)};"
                f" use another --run-dir or the original settings, or remove {folders} to train again"
            )
    run.update_recipe(recipe)
    if stored is None or stored.get("settings") != recipe.identity:
        write_json(file, {**plan_json(recipe, plan, rows), "data": data.digest, "settings": recipe.identity})
    return plan, rows


def _planned_rows(recipe: Recipe, plan: Plan, data: DatasetInfo, stored: dict[str, Any] | None) -> list[PlannedRow]:
    """Return the phases of a recipe, from ``plan.json`` if its identity keys are the same, and recomputed otherwise."""
    if stored is not None and stored.get("settings") == recipe.identity:
        return [
            PlannedRow(**{**row, "metrics": planned_metrics(row), "cost": Cost(**row["cost"])})
            for row in stored["rows"]
        ]
    return count_rows(recipe, plan, data)


def count_rows(recipe: Recipe, plan: Plan, data: DatasetInfo) -> list[PlannedRow]:
    """Return the phases of a recipe with their costs, lengths and identities.

    Args:
        recipe: The recipe.
        plan: Its plan.
        data: The whole data set.
    """
    return [
        replace(
            row,
            identity=phase_identity(recipe, plan, plan.row(row.phase, row.module), row.steps),
            data=dataset_digest_for_module(recipe, data, row.module),
        )
        for row in cost_plan(recipe, plan, data.samples["train"])
    ]


def expected_samples(recipe: Recipe) -> int:
    """Return the number of training samples for planning: that of the data if it exists, or ``data.train_samples``.

    Raises:
        ConfigError: Neither exists.
    """
    if recipe.data.path is not None and (Path(recipe.data.path) / "dataset.json").exists():
        return open_dataset(Path(recipe.data.path)).samples["train"]
    if recipe.data.train_samples is None:
        raise ConfigError(
            "the number of training samples is unknown: add --set data.train_samples=N, or --set data.path=DIR with"
            " prepared data"
        )
    return recipe.data.train_samples
