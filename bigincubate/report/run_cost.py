"""What a run costs, in one line, and how long it takes at the rate measured so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..errors import format_count
from ..planning.job_graph import Job
from ..storage.run_directory import START_RATE, PhaseDir, RunDir
from .units import format_duration, format_quantity

DAY = 24 * 3600.0
UPDATE_SECONDS = 600.0  # shortest time between two estimates; a long run prints about 20 to 60 of them in total


def describe_cost(run: RunDir, graph: Sequence[Job]) -> str:
    """Return the number of phases, optimizer steps and FLOPs of a run, and how many of the phases are done."""
    steps, flops = sum(job.steps for job in graph), sum(job.total_flops for job in graph)
    done = sum(run.phase(job.phase, job.module).result is not None for job in graph)
    finished = f"; {format_count(done, 'phase')} already done" if done else ""
    numbers = f"{format_count(len(graph), 'phase')}, {format_count(steps, 'step')}"
    return f"{numbers}, {format_quantity(flops, 'FLOP')} of training{finished}"


@dataclass
class TimeEstimate:
    """Estimate how long a run still takes: the FLOPs that are left, at the measured rate of the running phases.

    Attributes:
        run: The run directory.
        graph: The phases of the run.
        clock: Returns the time in seconds.
        starts: Last step and modification time of ``start_rate.json`` when a phase was first seen, by key.
        due: Time of the next estimate.
        printed: Number of estimates so far.
    """

    run: RunDir
    graph: Sequence[Job]
    clock: Callable[[], float] = time.monotonic
    starts: dict[str, tuple[int, int]] = field(default_factory=dict)
    due: float = 0.0
    printed: int = 0

    def update(self, running: Sequence[tuple[Job, PhaseDir]]) -> list[str]:
        """Return the lines to print now; none unless an estimate is due and every running phase has been measured.

        Args:
            running: The running phases.
        """
        for job, folder in running:
            if job.key not in self.starts:
                self.starts[job.key] = (folder.read_last_metrics().get("step", 0), _modified(folder))
        if not running or (self.printed and self.clock() < self.due):
            return []
        rates = [self._measure_rate(job, folder) for job, folder in running]
        if None in rates or not (rate := sum(filter(None, rates))):
            return []
        left = sum(job.total_flops * self._share_left(job) for job in self.graph)
        seconds = left / rate
        self.printed += 1
        self.due = self.clock() + max(UPDATE_SECONDS, seconds / 20)
        measured = ", measured in the first steps" if self.printed == 1 else ""
        lines = [
            f"about {format_duration(seconds)} left: {format_quantity(left, 'FLOP')} at"
            f" {format_quantity(rate, 'FLOP/s')}{measured}"
        ]
        if self.printed == 1 and seconds > DAY:
            lines.append(
                "warning: this run takes more than a day on this machine. Ctrl-C stops it; train.epochs or"
                " train.max_steps make it shorter, and `bigincubate plan` shows the cost of each phase"
            )
        return lines

    def _measure_rate(self, job: Job, folder: PhaseDir) -> float | None:
        """Return the FLOP/s of a running phase since it was first seen here, or None if it is not measured yet."""
        (first, modified), metrics = self.starts[job.key], folder.read_last_metrics()
        if metrics.get("step", 0) > first and "perf/gflops" in metrics:
            return 1e9 * float(metrics["perf/gflops"])
        if _modified(folder) == modified or (rate := folder.start_rate) is None:
            return None
        return 1e9 * rate

    def _share_left(self, job: Job) -> float:
        """Return the share of a phase's steps that are left."""
        folder = self.run.phase(job.phase, job.module)
        if folder.result is not None:
            return 0.0
        return max(0.0, 1 - folder.read_last_metrics().get("step", 0) / max(1, job.steps))


def _modified(folder: PhaseDir) -> int:
    """Return the modification time of the start rate of a phase in nanoseconds; 0 if there is none."""
    try:
        return (folder.path / START_RATE).stat().st_mtime_ns
    except OSError:
        return 0
