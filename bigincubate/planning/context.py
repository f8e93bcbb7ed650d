"""Set up a run or a phase from a recipe and a run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from ..config import Phase, Recipe, Settings
from ..data.dataset import DatasetInfo
from ..data.local_staging import use_local_cache
from ..data.partitions import open_module_partition
from ..distributed.process_group import DistributedContext
from ..models.partition import Partition
from ..storage.run_directory import PhaseDir, RunDir
from ..tasks.base import Task
from ..tasks.registry import make_task
from .phases import PhasePlan, Plan
from .planned_row import PlannedRow
from .prepare_run import ensure_data, ensure_plan


@dataclass(frozen=True)
class PhaseContext:
    """One phase of a run, on one rank.

    Attributes:
        recipe: The recipe; its ``data`` section refers to the data of this phase.
        plan: The plan of the run.
        row: The phase.
        planned: Its cost and length.
        run: The run directory.
        data: The data of the phase; with decentralized data, the partition of the module.
        env: The process group.
        imported: The files that the weights are imported from, if they are; for the description of the artifact.
    """

    recipe: Recipe
    plan: Plan
    row: PhasePlan
    planned: PlannedRow
    run: RunDir
    data: DatasetInfo
    env: DistributedContext
    imported: str | None = None

    @cached_property
    def settings(self) -> Settings:
        """The settings of the phase."""
        return self.recipe.settings(self.row.phase)

    @cached_property
    def task(self) -> Task:
        """The task of the phase."""
        return make_task(self.settings, self.recipe.data)

    @cached_property
    def folder(self) -> PhaseDir:
        """The phase's folder in the run directory."""
        return self.run.phase(self.row.phase, self.row.module)

    @cached_property
    def partition(self) -> Partition:
        """The partition of the phase's model."""
        return Partition(self.plan.family, self.row.depths)

    @cached_property
    def target_partition(self) -> Partition:
        """The partition of the target."""
        return Partition(self.plan.family, self.plan.target)

    @cached_property
    def meta_partition(self) -> Partition:
        """The partition of the meta model."""
        return Partition(self.plan.family, self.plan.meta)

    @contextmanager
    def with_local_data(self) -> Iterator[PhaseContext]:
        """Yield a context with a node-local copy of the data if ``data.local_cache`` is set."""
        with use_local_cache(self.recipe, self.data) as (recipe, data):
            yield replace(self, recipe=recipe, data=data)


@dataclass(frozen=True)
class RunContext:
    """A run whose data and plan exist.

    Attributes:
        recipe: The recipe.
        run: The run directory.
        data: The whole data set.
        plan: The plan of the run.
        rows: The phases with their costs and lengths.
    """

    recipe: Recipe
    run: RunDir
    data: DatasetInfo
    plan: Plan
    rows: list[PlannedRow]

    def phase(self, phase: Phase, module: int | None = None, env: DistributedContext | None = None) -> PhaseContext:
        """Return the context of a phase, with only the data that it may use.

        Raises:
            ConfigError: There is no such phase, or its data is not the data that it may use.
            DataError: The module's partition of the data is missing or damaged.
        """
        row = self.plan.row(phase, module)
        planned = next(planned for planned in self.rows if planned.key == row.key)
        recipe, data = open_module_partition(self.recipe, self.data, module)
        return PhaseContext(recipe, self.plan, row, planned, self.run, data, env or DistributedContext())


def open_run(
    recipe: Recipe, run: RunDir, *, report: Callable[[str], None] = lambda text: None, module: int | None = None
) -> RunContext:
    """Open a run directory for a recipe; prepare built-in data and compute the plan if they are missing.

    Args:
        recipe: The recipe.
        run: The run directory; created if it is missing.
        report: Called with a message before slow work.
        module: Open the run only for this module; with decentralized data, only its partition has to be present.

    Raises:
        ConfigError: A phase has begun, and the recipe would invalidate it or the run was created with other data.
        DataError: The data is missing, or is not what the recipe expects.
    """
    run.create(recipe)
    data = ensure_data(recipe, run, report, module)
    plan, rows = ensure_plan(recipe, run, data, report)
    return RunContext(recipe, run, data, plan, rows)
