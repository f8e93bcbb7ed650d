"""What is known of a run: its files, read once, in the order of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..config import Recipe
from ..files import read_json, read_json_lines
from ..storage.run_directory import RunDir
from ..tasks.metric import Metric, planned_metrics
from .status import run_status

COSTS = ("epochs", "seen", "flops", "seconds")
LEAST = dict.fromkeys(COSTS, 0.0)
LOSS = "loss"  # the metric of validation that is drawn with the loss of training, where a task has one of this name


@dataclass(frozen=True)
class Point:
    """A logged step: what it had cost since the phase began (keys of ``COSTS``), and what was measured."""

    step: int
    cost: dict[str, float]
    loss: float | None  # of training
    metrics: dict[str, float]  # of validation, by name


@dataclass(frozen=True)
class PhaseFacts:
    """One phase, or one module's incubation."""

    planned: dict[str, Any]  # its row of plan.json
    status: dict[str, Any]  # its row of `status`
    result: dict[str, Any] | None
    attempts: list[dict[str, Any]]
    requeues: list[dict[str, Any]]
    rows: list[dict[str, Any]]  # of metrics.jsonl

    @property
    def key(self) -> str:
        return str(self.planned["key"])

    @property
    def title(self) -> str:
        return str(self.planned["title"])

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        return planned_metrics(self.planned)

    @property
    def headline(self) -> Metric:
        return self.metrics[0]

    @property
    def score(self) -> float | None:
        """The headline of the result."""
        return self.headline.value_in(self.result)

    @property
    def unit(self) -> str:
        """What a sample is called."""
        return str(self.planned["unit"])

    @property
    def begun(self) -> bool:
        return bool(self.result or self.attempts)

    @cached_property
    def points(self) -> list[Point]:
        """What was logged. Seconds between two lines follow from the measured rate; where the phase is done they are
        stretched to what it took, which counts checkpoints and evaluations too."""
        made: list[Point] = []
        seconds: list[float] = []
        last = 0
        for row in self.rows:
            seen = (row["step"] - last) * self.planned["batch_size"]
            rate = row.get(f"perf/{self.unit}_per_sec")
            before = seconds[-1] if seconds else 0.0
            seconds.append(before + seen / rate if rate else before)
            last = row["step"] if rate else last
        whole = self.result["seconds"] / seconds[-1] if self.result and seconds and seconds[-1] else 1.0
        for row, elapsed in zip(self.rows, seconds, strict=True):
            cost = {**self.cost(row["step"]), "seconds": elapsed * whole}
            metrics = {m.name: row[tag] for m in self.metrics if (tag := f"val/{m.name}") in row}
            made.append(Point(row["step"], cost, row.get("train/loss"), metrics))
        return made

    def cost(self, step: int) -> dict[str, float]:
        """What so many steps cost, without time."""
        seen = step * self.planned["batch_size"]
        epochs = self.planned["epochs"] * step / max(1, self.planned["steps"])
        return {"epochs": epochs, "seen": seen, "flops": seen * self.planned["cost"]["training_flops"]}

    @property
    def spent(self) -> dict[str, float]:
        """What the phase has cost until now."""
        if self.result:
            return {
                **self.cost(self.result["steps"]),
                **{key: self.result[key] for key in ("seen", "flops", "seconds")},
            }
        return self.points[-1].cost if self.points else LEAST

    @property
    def device_seconds(self) -> tuple[float, str] | None:
        """Seconds times the GPUs, or the CPU cores, that were at work. None where attempts had different machines, or
        did not say."""
        keys = ("device", "world", "threads")
        layouts = [tuple(map(each.get, keys)) for each in self.attempts]
        if len(set(layouts)) != 1 or None in layouts[0]:
            return None
        device, world, threads = (self.attempts[0][key] for key in keys)
        cores = device.startswith("CPU")
        return self.spent["seconds"] * world * (threads if cores else 1), "core" if cores else "GPU"


@dataclass(frozen=True)
class Way:
    """One way in which a run trains its model: by incubation, or end to end."""

    name: str
    phases: list[PhaseFacts]
    assembled: dict[str, Any] | None

    @property
    def last(self) -> PhaseFacts:
        return self.phases[-1]

    @property
    def modules(self) -> list[PhaseFacts]:
        return [phase for phase in self.phases if phase.planned["phase"] == "incubate"]

    @property
    def meta(self) -> PhaseFacts | None:
        return self.phases[0] if self.modules else None

    @property
    def hybrid_range(self) -> list[PhaseFacts]:
        """The modules whose hybrids scored worst and best; none before one is done."""
        done = [phase for phase in self.modules if phase.score is not None]
        if not done:
            return []
        done.sort(key=lambda phase: phase.score or 0.0, reverse=not done[0].headline.higher_is_better)
        return [done[0], done[-1]]

    @property
    def missing(self) -> list[str]:
        return [phase.title for phase in self.phases if phase.result is None]

    @property
    def spent(self) -> dict[str, float]:
        return {key: sum(phase.spent[key] for phase in self.phases) for key in COSTS}

    @property
    def path_seconds(self) -> float:
        """Training seconds from the first step to the last, where modules train beside each other."""
        modules = [phase.spent["seconds"] for phase in self.modules]
        return self.spent["seconds"] - sum(modules) + max(modules, default=0.0)


@dataclass(frozen=True)
class RunFacts:
    run: RunDir
    recipe: Recipe
    plan: dict[str, Any]
    ways: list[Way]
    events: list[dict[str, Any]]

    @property
    def phases(self) -> list[PhaseFacts]:
        return [phase for way in self.ways for phase in way.phases]

    @property
    def missing(self) -> list[str]:
        return [title for way in self.ways for title in way.missing]

    def way(self, name: str) -> Way | None:
        return next((way for way in self.ways if way.name == name), None)


def read_run(run: RunDir) -> RunFacts:
    """Everything that a run's files say about it, finished or not. A way that nobody began is left out, unless nothing
    has begun.

    Raises:
        ArtifactError: not a run directory, or nothing has been planned in it yet.
    """
    recipe, status = run.load_recipe(), {row["phase"]: row for row in run_status(run)}
    plan = read_json(run.path / "plan.json")
    assert plan is not None  # else there is no status
    phases = {row["key"]: _phase(run, row, status[row["key"]]) for row in plan["rows"] if row["key"] in status}
    baseline = phases.pop("end_to_end", None)
    ways = [Way("incubated", list(phases.values()), run.assembled.result)]
    if baseline is not None:
        ways.append(Way("end to end", [baseline], None))
    begun = [way for way in ways if any(phase.begun for phase in way.phases)]
    return RunFacts(run, recipe, plan, begun or ways[:1], read_json_lines(run.path / "events.jsonl"))


def _phase(run: RunDir, planned: dict[str, Any], status: dict[str, Any]) -> PhaseFacts:
    folder = run.phase(planned["phase"], planned["module"])
    requeues = read_json_lines(folder.path / "requeues.jsonl")
    return PhaseFacts(planned, status, folder.result, folder.read_attempts(), requeues, read_json_lines(folder.metrics))
