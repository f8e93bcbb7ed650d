"""What `run`, `submit` and `plan` say about the cost of a run, and the estimate of the time that is left."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from records import make_result

from bigincubate.errors import Preempted
from bigincubate.files import append_json_line
from bigincubate.launchers import local
from bigincubate.planning.job_graph import Job, build_job_graph
from bigincubate.report.run_cost import UPDATE_SECONDS, TimeEstimate, describe_cost
from bigincubate.report.units import format_duration, format_quantity
from bigincubate.storage.run_directory import START_RATE, PhaseDir

Called = Callable[..., tuple[int, str, str]]
Harnesses = Callable[..., Any]


def measure(folder: PhaseDir, gflops: float, step: int = 0) -> None:
    """Write a rate as a phase does: before its first logged step, or with it."""
    folder.path.mkdir(parents=True, exist_ok=True)
    if step:
        append_json_line(folder.metrics, {"step": step, "perf/gflops": gflops})
    else:
        (folder.path / START_RATE).write_text(json.dumps({"gflops": gflops}))


class Watched:
    """A run of two modules whose phases do nothing, with a clock of its own."""

    def __init__(self, made: Any) -> None:
        self.run, self.now = made.run, 0.0
        self.graph = build_job_graph(made.rows, baseline=False)
        self.estimate = TimeEstimate(self.run, self.graph, lambda: self.now)
        self.total = sum(job.total_flops for job in self.graph)

    def folder(self, job: Job) -> PhaseDir:
        folder: PhaseDir = self.run.phase(job.phase, job.module)
        return folder

    def update(self, *jobs: Job) -> list[str]:
        return self.estimate.update([(job, self.folder(job)) for job in jobs])


@pytest.fixture
def watched(harness: Harnesses) -> Watched:
    return Watched(harness("train.max_steps=8"))


def test_estimate_is_the_flops_that_are_left_at_the_measured_rate(watched: Watched) -> None:
    meta, first, second, _ = watched.graph
    measure(watched.folder(meta), gflops=5.0)  # by an earlier attempt, on another machine
    assert watched.update() == watched.update(meta) == []
    watched.folder(meta).path.joinpath(START_RATE).unlink()
    measure(watched.folder(meta), gflops=0.001)
    (line,) = watched.update(meta)
    seconds = watched.total / 1e6
    assert line == (
        f"about {format_duration(seconds)} left: {format_quantity(watched.total, 'FLOP')} at 1.00 MFLOP/s,"
        " measured in the first steps"
    )
    assert watched.update(meta) == []  # not due yet

    measure(watched.folder(meta), gflops=0.004, step=4)
    watched.now = UPDATE_SECONDS
    left = watched.total - meta.total_flops / 2
    assert watched.update(meta) == [
        f"about {format_duration(left / 4e6)} left: {format_quantity(left, 'FLOP')} at 4.00 MFLOP/s"
    ]

    watched.folder(meta).write_result(make_result(steps=8))
    assert watched.update(first, second) == []
    measure(watched.folder(first), gflops=0.002)
    watched.now *= 3
    assert watched.update(first, second) == []  # module 1 has not been measured
    measure(watched.folder(second), gflops=0.001)
    left = watched.total - meta.total_flops
    assert watched.update(first, second) == [
        f"about {format_duration(left / 3e6)} left: {format_quantity(left, 'FLOP')} at 3.00 MFLOP/s"
    ]


def test_run_of_more_than_a_day_is_a_warning_and_long_runs_say_it_seldom(watched: Watched) -> None:
    meta = watched.graph[0]
    watched.update(meta)
    measure(watched.folder(meta), gflops=watched.total / (48 * 3600) / 1e9)
    line, warning = watched.update(meta)
    assert line.startswith("about 2 d 00 h left: ")
    assert warning.startswith("warning: this run takes more than a day on this machine.")
    assert {"train.epochs", "train.max_steps"} <= set(warning.split())
    printed = []
    for minute in range(1, 24 * 60):
        watched.now = 60.0 * minute
        printed += watched.update(meta)
    assert 5 < len(printed) < 15
    assert not any("warning" in line for line in printed)


def test_cost_counts_steps_flops_and_finished_phases(watched: Watched, done: Any) -> None:
    cost = describe_cost(watched.run, watched.graph)
    assert cost == f"4 phases, 32 steps, {format_quantity(watched.total, 'FLOP')} of training"
    graph = build_job_graph(done.rows, baseline=True)
    assert describe_cost(done.run, graph).endswith("; 4 phases already done")


def test_attempt_measures_its_first_steps(harness: Harnesses) -> None:
    made = harness("train.max_steps=3")
    made.train("pretrain")
    assert not (made.run.path / "meta" / START_RATE).exists()  # too short: the first step does not count
    made = harness("train.max_steps=4", "log.every_steps=4")
    made.train("pretrain")
    start = json.loads((made.run.path / "meta" / START_RATE).read_text())
    assert start["gflops"] > made.log("pretrain")[0]["perf/gflops"] * 0.5


def test_run_begins_with_the_cost_and_prints_estimates(
    fast: Path, tmp_path: Path, call: Called, monkeypatch: pytest.MonkeyPatch, counted: None
) -> None:
    def execute(runner: local.LocalRunner, graph: list[Job]) -> None:
        folder = runner.run.phase("pretrain")
        running = [(graph[0], folder)]
        runner.estimate(running)
        measure(folder, gflops=1e-6)
        for line in runner.estimate(running):
            runner.reporter.say(line)
        raise Preempted("enough")

    monkeypatch.setattr(local.LocalRunner, "execute", execute)
    code, out, _ = call("run", fast, "--run-dir", tmp_path / "run")
    first, second, third, *_ = out.splitlines()
    assert (code, first) == (75, next(line for line in out.splitlines() if line))
    assert re.fullmatch(r"smoke: 4 phases, 48 steps, [\d.]+ GFLOP of training", first)
    assert re.fullmatch(r"about .* left: [\d.]+ GFLOP at 1.00 kFLOP/s, measured in the first steps", second)
    assert third.startswith("warning: ")


def test_submit_begins_with_the_cost(
    fast: Path, tmp_path: Path, call: Called, monkeypatch: pytest.MonkeyPatch, counted: None
) -> None:
    from bigincubate.cli import slurm

    monkeypatch.setattr(slurm, "submit_or_export", lambda run: None)
    code, out, err = call("submit", fast, "--run-dir", tmp_path / "run", "--baseline")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"smoke: 5 phases, \d+ steps, [\d.]+ GFLOP of training\n", out)


def test_plan_shows_sharding_only_if_it_is_asked(fast: Path, call: Called, counted: None) -> None:
    code, out, _ = call("plan", fast)
    assert code == 0
    assert out.startswith("smoke: cost of each phase")
    assert "zero3" not in out
    for words in (("--sharding",), ("--world", "2")):
        shown = call("plan", fast, *words)[1]
        assert shown.startswith(out.split("incubation:")[0])
        assert "zero3" in shown
