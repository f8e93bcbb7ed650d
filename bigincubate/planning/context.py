"""What a phase is set up with: the one way from a recipe and a run directory to everything that a phase needs."""

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
from .cost import PlannedRow
from .phases import PhasePlan, Plan
from .prepare_run import ensure_data, ensure_plan


@dataclass(frozen=True)
class PhaseContext:
    """One phase of a run, on one rank.

    Attributes:
        recipe: the recipe; its ``data`` section names the data of this phase.
        plan: how the model is cut.
        row: the phase.
        planned: its cost and length.
        run: the run directory.
        data: what the phase trains on: a module's part, where data is decentralized.
        env: the ranks.
    """

    recipe: Recipe
    plan: Plan
    row: PhasePlan
    planned: PlannedRow
    run: RunDir
    data: DatasetInfo
    env: DistributedContext

    @cached_property
    def settings(self) -> Settings:
        """What the phase computes with."""
        return self.recipe.settings(self.row.phase)

    @cached_property
    def task(self) -> Task:
        """What the phase learns."""
        return make_task(self.settings, self.recipe.data)

    @cached_property
    def folder(self) -> PhaseDir:
        """The phase's folder in the run directory."""
        return self.run.phase(self.row.phase, self.row.module)

    @cached_property
    def partition(self) -> Partition:
        """Which module owns which tensor of the phase's model."""
        return Partition(self.plan.family, self.row.depths)

    @cached_property
    def target_partition(self) -> Partition:
        """The same for the target."""
        return Partition(self.plan.family, self.plan.target)

    @cached_property
    def meta_partition(self) -> Partition:
        """The same for the meta model."""
        return Partition(self.plan.family, self.plan.meta)

    @contextmanager
    def with_local_data(self) -> Iterator[PhaseContext]:
        """Yield a context whose data is a copy on a disk of this node, where ``data.local_cache`` asks for one."""
        with use_local_cache(self.recipe, self.data) as (recipe, data):
            yield replace(self, recipe=recipe, data=data)


@dataclass(frozen=True)
class RunContext:
    """A run whose data and plan are settled.

    Attributes:
        recipe: the recipe.
        run: the run directory.
        data: the whole data set.
        plan: how the model is cut.
        rows: the phases with their costs and lengths.
    """

    recipe: Recipe
    run: RunDir
    data: DatasetInfo
    plan: Plan
    rows: list[PlannedRow]

    def phase(self, phase: Phase, module: int | None = None, env: DistributedContext | None = None) -> PhaseContext:
        """Return the context of a phase, with the data that it may see.

        Raises:
            ConfigError: there is no such phase, or its data is not what it may see.
            DataError: a module's part of the data is missing or damaged.
        """
        row = self.plan.row(phase, module)
        planned = next(planned for planned in self.rows if planned.key == row.key)
        recipe, data = open_module_partition(self.recipe, self.data, module)
        return PhaseContext(recipe, self.plan, row, planned, self.run, data, env or DistributedContext())


def open_run(
    recipe: Recipe, run: RunDir, *, report: Callable[[str], None] = lambda text: None, module: int | None = None
) -> RunContext:
    """Open a run directory for a recipe; prepare embedded data and count the plan where they are missing.

    Args:
        recipe: the recipe.
        run: the run directory, made where it is missing.
        report: called with what takes a while.
        module: for this module only, which needs no more of decentralized data than the description of the whole.

    Raises:
        ConfigError: the recipe would invalidate what has begun in the directory, or it was made with other data.
        DataError: there is no data, or it is not what the recipe expects.
    """
    run.create(recipe)
    data = ensure_data(recipe, run, report, module)
    plan, rows = ensure_plan(recipe, run, data)
    return RunContext(recipe, run, data, plan, rows)
