"""Read all data of a run from its files, in the order of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..config import Recipe
from ..launchers.slurm.submission_log import QueuedJob
from ..storage.run_directory import RunDir
from ..tasks.metric import Metric, planned_metrics
from .status import read_plan, read_queue, run_status

COSTS = ("epochs", "seen", "flops", "seconds")
NO_COST = dict.fromkeys(COSTS, 0.0)
LOSS = "loss"  # a metric of this name is plotted together with the training loss


@dataclass(frozen=True)
class Point:
    """A logged step.

    Attributes:
        step: Optimizer step.
        cost: Cost since the start of the phase, by the keys in ``COSTS``.
        loss: Training loss.
        metrics: Metrics of the validation split by name.
    """

    step: int
    cost: dict[str, float]
    loss: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class PhaseData:
    """One phase, or the incubation of one module.

    Attributes:
        planned: Its row of ``plan.json``.
        status: Its row of the status (:func:`.run_status`).
        result: Its result; None if it has not finished.
        attempts: Its attempts, oldest first.
        requeues: The requeues of its Slurm jobs.
        rows: The rows of ``metrics.jsonl``.
    """

    planned: dict[str, Any]
    status: dict[str, Any]
    result: dict[str, Any] | None
    attempts: list[dict[str, Any]]
    requeues: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    @property
    def key(self) -> str:
        """Return the key of the phase."""
        return str(self.planned["key"])

    @property
    def title(self) -> str:
        """Return the name of the phase in tables."""
        return str(self.planned["title"])

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """Return the metrics of the phase's task."""
        return planned_metrics(self.planned)

    @property
    def headline(self) -> Metric:
        """Return the main metric, the first one."""
        return self.metrics[0]

    @property
    def score(self) -> float | None:
        """Return the headline metric of the result, or None."""
        return self.headline.value_in(self.result)

    @property
    def unit(self) -> str:
        """Return the name of what the task counts, such as ``"images"``."""
        return str(self.planned["unit"])

    @property
    def started(self) -> bool:
        """Return whether the phase has had an attempt."""
        return bool(self.result or self.attempts)

    @cached_property
    def points(self) -> list[Point]:
        """Return the logged steps.

        The seconds between two steps are computed from the measured throughput. In a finished phase they are scaled so
        that their sum is the time in the result, which includes checkpoints and evaluations.
        """
        points: list[Point] = []
        seconds: list[float] = []
        measured, last = 0.0, 0
        for row in self.rows:
            if rate := row.get(f"perf/{self.unit}_per_sec"):
                measured += (row["step"] - last) * self.planned["batch_units"] / rate
                last = row["step"]
            seconds.append(measured)
        scale = self.result["seconds"] / measured if self.result and measured else 1.0
        for row, elapsed in zip(self.rows, seconds, strict=True):
            cost = {**self.cost(row["step"]), "seconds": elapsed * scale}
            metrics = {m.name: row[tag] for m in self.metrics if (tag := f"val/{m.name}") in row}
            points.append(Point(row["step"], cost, row.get("train/loss"), metrics))
        return points

    def cost(self, step: int) -> dict[str, float]:
        """Return the cost of a number of steps, except for the time."""
        epochs = self.planned["epochs"] * step / max(1, self.planned["steps"])
        flops = step * self.planned["batch_size"] * self.planned["cost"]["training_flops"]
        return {"epochs": epochs, "seen": step * self.planned["batch_units"], "flops": flops}

    @property
    def spent(self) -> dict[str, float]:
        """Return the cost of the phase so far."""
        if self.result:
            return self.cost(self.result["steps"]) | {key: self.result[key] for key in ("seen", "flops", "seconds")}
        return self.points[-1].cost if self.points else NO_COST

    @property
    def peak_memory(self) -> float:
        """Return the largest memory of rank 0 that was logged, in bytes; 0 if none was."""
        return 2**30 * max((row.get("memory/peak_gib", 0.0) for row in self.rows), default=0.0)

    @property
    def sent_gradients(self) -> float:
        """Return the bytes of gradients that each rank has passed to all-reduce; 0 if there was one rank."""
        if all(attempt["world"] == 1 for attempt in self.attempts):
            return 0.0
        steps = self.spent["seen"] / self.planned["batch_units"]
        return float(steps * self.planned["cost"]["allreduce_bytes"])

    @property
    def device_seconds(self) -> tuple[float, str] | None:
        """Return the seconds multiplied by the number of GPUs or CPU cores in use, and ``"GPU"`` or ``"core"``.

        None if there are no attempts, or if they differ in device, ranks or threads.
        """
        layouts = {(each["device"], each["world"], each["threads"]) for each in self.attempts}
        if len(layouts) != 1:
            return None
        device, world, threads = layouts.pop()
        cores = device.startswith("CPU")
        return self.spent["seconds"] * world * (threads if cores else 1), "core" if cores else "GPU"


@dataclass(frozen=True)
class TrainingRoute:
    """A way to train the model of a run: from the meta model or a finished model, or end to end.

    Attributes:
        name: ``incubated``, ``expanded`` (no module is incubated), ``fine-tuned`` (a finished model) or ``end to end``.
        phases: The phases in order.
        assembled: The result of the assembled model, or None.
    """

    name: str
    phases: list[PhaseData]
    assembled: dict[str, Any] | None

    @property
    def last(self) -> PhaseData:
        """Return the phase that trains the final model."""
        return self.phases[-1]

    @property
    def is_baseline(self) -> bool:
        """Return whether this is end-to-end training."""
        return self.last.planned["phase"] == "end_to_end"

    @property
    def modules(self) -> list[PhaseData]:
        """Return the incubation phases, one per module."""
        return [phase for phase in self.phases if phase.planned["phase"] == "incubate"]

    @property
    def meta(self) -> PhaseData | None:
        """Return the phase of the meta model, or None if the route has none."""
        return next((phase for phase in self.phases if phase.planned["phase"] == "pretrain"), None)

    @property
    def hybrid_range(self) -> list[PhaseData]:
        """Return the modules with the worst and the best hybrid, or an empty list if none has finished."""
        done = [phase for phase in self.modules if phase.score is not None]
        if not done:
            return []
        done.sort(key=lambda phase: phase.score or 0.0, reverse=not done[0].headline.higher_is_better)
        return [done[0], done[-1]]

    @property
    def missing(self) -> list[str]:
        """Return the titles of the unfinished phases."""
        return [phase.title for phase in self.phases if phase.result is None]

    @property
    def spent(self) -> dict[str, float]:
        """Return the cost of all phases so far."""
        return {key: sum(phase.spent[key] for phase in self.phases) for key in COSTS}

    def path(self, cost: str) -> float:
        """Return a cost so far, one of ``COSTS``, on the critical path: of all modules, only the largest counts."""
        modules = [phase.spent[cost] for phase in self.modules]
        return self.spent[cost] - sum(modules) + max(modules, default=0.0)


@dataclass(frozen=True)
class RunData:
    """All data of a run.

    Attributes:
        run: The run directory.
        recipe: The resolved recipe.
        plan: The content of ``plan.json``.
        routes: The routes that were started.
        events: The rows of ``events.jsonl``.
    """

    run: RunDir
    recipe: Recipe
    plan: dict[str, Any]
    routes: list[TrainingRoute]
    events: list[dict[str, Any]]

    @property
    def phases(self) -> list[PhaseData]:
        """Return the phases of all routes."""
        return [phase for route in self.routes for phase in route.phases]

    @property
    def main(self) -> TrainingRoute | None:
        """Return the route that ends with fine-tuning, or None if it was not started."""
        return next((route for route in self.routes if not route.is_baseline), None)

    @property
    def baseline(self) -> TrainingRoute | None:
        """Return the route of end-to-end training, or None if it was not started."""
        return next((route for route in self.routes if route.is_baseline), None)


def read_run(run: RunDir, read_jobs: Callable[[RunDir], Sequence[QueuedJob] | None] = read_queue) -> RunData:
    """Read all data of a finished or unfinished run.

    Routes without attempts are omitted, except that the first one is included if there are no attempts at all.

    Args:
        run: The run directory.
        read_jobs: Returns the jobs of the run in the queue, or None.

    Raises:
        ArtifactError: This is not a run directory, or it has no plan yet.
    """
    recipe, plan, status = run.load_recipe(), read_plan(run), {row["phase"]: row for row in run_status(run, read_jobs)}
    phases = {row["key"]: _phase(run, row, status[row["key"]]) for row in plan["rows"] if row["key"] in status}
    baseline = phases.pop("end_to_end", None)
    names = {"incubate": "incubated", "pretrain": "expanded", "finetune": "fine-tuned"}  # the first that has a phase
    name = next(names[kind] for kind in names if any(row["phase"] == kind for row in plan["rows"]))
    assembled = run.assembled.result if "pretrain" in phases else None
    routes = [TrainingRoute(name, list(phases.values()), assembled)]
    if baseline is not None:
        routes.append(TrainingRoute("end to end", [baseline], None))
    started = [route for route in routes if any(phase.started for phase in route.phases)]
    return RunData(run, recipe, plan, started or routes[:1], run.read_events())


def _phase(run: RunDir, planned: dict[str, Any], status: dict[str, Any]) -> PhaseData:
    folder = run.phase(planned["phase"], planned["module"])
    logged = folder.read_attempts(), folder.read_requeues(), folder.read_metrics()
    return PhaseData(planned, status, folder.result, *logged)
