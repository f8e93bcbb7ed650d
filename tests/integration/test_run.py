"""`bigincubate run`: everything on this machine, interrupted in every way, and done in the end."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Command, die_before, fork_ranks, hold_step, run
from records import make_result
from rich.console import Console

from bigincubate.errors import Exit
from bigincubate.launchers import local
from bigincubate.launchers import rank_group as ranks
from bigincubate.launchers.local import LocalRunner
from bigincubate.launchers.progress import ProgressReporter
from bigincubate.planning.job_graph import build_job_graph
from bigincubate.storage.lease import process_start_time
from bigincubate.storage.run_directory import RunDir

Harnesses = Callable[..., Any]


def words(harness: Any, *more: object) -> list[object]:
    return ["run", harness.run.recipe_file, "--run-dir", harness.run.path, "--jobs", 2, *more]


def same_weights(one: Any, other: Any, phase: str, module: int | None = None) -> bool:
    a, b = one.weights(phase, module), other.weights(phase, module)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ from scratch


class FromScratch:
    """The whole pipeline as a user starts it, its output in a pipe and its input closed; then once more."""

    def __init__(self, recipe: Path, folder: Path) -> None:
        self.run = RunDir(folder / "run")
        program = [sys.executable, "-m", "bigincubate"]
        self.words = ["run", str(recipe), "--run-dir", str(self.run.path), "--jobs", "2", "--baseline"]
        closed = ["bash", "-c", '"$@" <&-', "bash", *program, *self.words]
        self.first = subprocess.run(closed, capture_output=True, text=True, timeout=600, check=False)
        self.second = run(*self.words)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> FromScratch:
    from conftest import SMOKE

    folder = tmp_path_factory.mktemp("scratch")
    recipe = folder / "smoke.toml"
    recipe.write_text(SMOKE)
    return FromScratch(recipe, folder)


def test_run_makes_every_phase_from_an_empty_folder(scratch: FromScratch) -> None:
    assert scratch.first.returncode == 0, scratch.first.stderr
    assert scratch.first.stderr == ""
    folder = scratch.run.path
    for part in ("meta", "modules/00", "modules/01", "finetune", "end_to_end"):
        assert (folder / part / "DONE").exists(), part
        assert (folder / part / "artifact" / "weights.safetensors").exists(), part
        assert (folder / part / "logs" / "train.log").exists(), part
        assert list((folder / part / "tb").glob("events*")), part
        assert (folder / part / "owners" / "1.json").read_text() == "", part
    assert (folder / "assembled" / "artifact" / "weights.safetensors").exists()
    assert {file.name for file in (folder / "export").iterdir()} == {"README.md", "model.safetensors", "config.json"}
    assert json.loads((folder / "plan.json").read_text())["recipe"] == "smoke"
    assert (folder / "data" / "dataset.json").exists()


def test_summary_has_every_phase(scratch: FromScratch) -> None:
    summary = json.loads((scratch.run.path / "summary.json").read_text())
    assert len(summary["modules"]) == 2
    results = [summary[key] for key in ("meta", "assembled", "finetune", "end_to_end")] + summary["modules"]
    for result in results:
        assert result.keys() >= {"metrics", "headline", "samples", "unit", "steps", "seen", "flops", "seconds"}
        assert 0 <= result["metrics"]["top1"] <= result["metrics"]["top5"] <= 100
    # the baseline has the floating point operations of the whole incubation, but for less than a step
    incubation = sum(result["flops"] for result in results if result is not summary["end_to_end"])
    one_step = summary["end_to_end"]["flops"] / summary["end_to_end"]["steps"]
    assert incubation - one_step < summary["end_to_end"]["flops"] <= incubation


def test_output_to_a_pipe_is_plain_lines_and_a_table(scratch: FromScratch) -> None:
    out = scratch.first.stdout
    assert "\x1b" not in out
    assert "\r" not in out
    lines = [line.rstrip() for line in out.splitlines()]
    for title in ("meta model", "module 0", "module 1", "fine-tuning", "end to end"):
        assert f"{title}: started" in lines
        assert any(re.fullmatch(rf"{title}: step \d+ of \d+, loss [\d.]+  \d+ images/s", line) for line in lines), title
        assert any(re.fullmatch(rf"{title}: done, top-1 [\d.]+%", line) for line in lines), title
    assert "module 0 (as a hybrid)" in out
    for title in ("meta model", "assembled", "fine-tuned", "end to end"):
        assert any(line.startswith(f"{title} ") for line in lines), title
    assert f"bigincubate evaluate {scratch.run.path} --data {scratch.run.path / 'data'}" in out


def test_printed_next_command_works(scratch: FromScratch) -> None:
    command = scratch.first.stdout.rpartition("next:")[2].split()
    assert command[0] == "bigincubate"
    scores = run(*command[1:], "--json")
    assert scores.wait() == 0
    expected = json.loads((scratch.run.path / "summary.json").read_text())["finetune"]["metrics"]
    found = json.loads(scores.out)
    assert found["top1"] == expected["top1"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_second_run_does_nothing(scratch: FromScratch) -> None:
    assert scratch.second.wait() == 0
    assert "is already done" in scratch.second.out
    assert "started" not in scratch.second.out
    assert "fine-tuned" in scratch.second.out
    assert [len(scratch.run.phase("incubate", module).read_attempts()) for module in (0, 1)] == [1, 1]


def test_interrupted_export_is_made_again(scratch: FromScratch) -> None:
    export = scratch.run.path / "export"
    files = {file.name: file.read_bytes() for file in export.iterdir()}
    shutil.rmtree(export)
    killed = run(*scratch.words, before=partial(die_before, "bigincubate.storage.artifacts", "ModelSpec.model_dump"))
    assert killed.wait() == -signal.SIGKILL
    assert not export.exists()
    again = run(*scratch.words)
    assert again.wait() == 0, again.err
    assert {file.name: file.read_bytes() for file in export.iterdir()} == files
    assert not [path for path in scratch.run.path.iterdir() if "export" in path.name and path != export]


# ------------------------------------------------------------------------------------------------ interrupted


def shell() -> None:
    """A shell gives a command its own process group; the phases of this one are spared the imports."""
    os.setpgrp()
    fork_ranks()


def shell_with_held_steps() -> None:
    shell()
    hold_step(12)


class Launched:
    """The launcher as a shell starts it."""

    def __init__(self, harness: Any, before: Callable[[], None] = shell) -> None:
        self.harness = harness
        self.command = Command(*words(harness), before=before)

    def until_step(self, step: int, *places: tuple[str, int | None]) -> None:
        def reached() -> bool:
            return all(any(row["step"] >= step for row in self.harness.log(*place)) for place in places)

        assert self.command.until(reached, pause=0.01), self.command.out + self.command.err

    def interrupt(self) -> int:
        """Ctrl-C: the terminal signals the whole group."""
        os.killpg(self.command.pid, signal.SIGINT)
        return self.command.wait()


@pytest.fixture(scope="module")
def plain(harness: Harnesses) -> Any:
    """What nothing happened to."""
    done = harness("train.max_steps=150", "log.every_steps=2", "checkpoint.every_steps=20", "incubate.optim.name=lamb")
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)):
        done.train(phase, module)
    return done


def after_the_meta_model(plain: Any, folder: Path) -> Any:
    other = plain.copy(folder)
    for part in ("modules", "finetune", "assembled", "summary.json"):
        path = folder / part
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return other


def test_ctrl_c_then_kill_9_then_the_same_command_finishes_with_the_same_bits(plain: Any, tmp_path: Path) -> None:
    other = after_the_meta_model(plain, tmp_path / "run")
    modules: list[tuple[str, int | None]] = [("incubate", 0), ("incubate", 1)]

    launched = Launched(other, before=shell_with_held_steps)
    launched.until_step(10, *modules)
    assert launched.interrupt() == 75
    assert "stopping: each running phase writes a checkpoint first" in launched.command.out
    assert f"bigincubate run {other.run.recipe_file} --run-dir {other.run.path} --jobs 2" in launched.command.out
    assert "failed" not in launched.command.out
    for place in modules:
        assert [attempt["state"] for attempt in other.run.phase(*place).read_attempts()] == ["preempted"]
        steps = [row["step"] for row in other.log(*place)]
        assert 10 <= steps[-1] < 150

    launched = Launched(other)
    children: list[int] = []

    def both_run() -> bool:
        children[:] = [
            attempts[-1]["pid"] for place in modules if (attempts := other.run.phase(*place).read_attempts())
        ]
        return all(len(other.run.phase(*place).read_attempts()) == 2 for place in modules)

    assert launched.command.until(both_run, pause=0.01), launched.command.out
    launched.command.kill()

    last = Command(*words(other), before=fork_ranks)
    assert last.wait(240) == 0, last.out + last.err
    for place in [*modules, ("finetune", None)]:
        assert same_weights(plain, other, *place), place
        assert [row["step"] for row in other.log(*place)] == list(range(2, 151, 2))
    # no orphan; a zombie has ended, and pid 1 may take a moment to reap it
    assert [process_start_time(pid) for pid in children] == [None] * len(children)


def test_ctrl_c_before_the_phases_have_begun_is_no_failure(plain: Any, tmp_path: Path) -> None:
    other = after_the_meta_model(plain, tmp_path / "run")
    launched = Launched(other, before=os.setpgrp)  # phases that import first
    assert launched.command.until(lambda: launched.command.out.count("started") >= 2, pause=0.01)
    time.sleep(0.3)
    assert launched.interrupt() == 75
    assert "failed" not in launched.command.out
    assert launched.command.err == ""


# ------------------------------------------------------------------------------------------------ failing


def test_failing_module_does_not_stop_the_others(plain: Any, tmp_path: Path) -> None:
    other = after_the_meta_model(plain, tmp_path / "run")
    shutil.copytree(plain.run.path / "modules" / "01", other.run.path / "modules" / "01")
    (other.run.path / "modules" / "01" / "DONE").unlink()
    for file in (other.run.path / "modules" / "01" / "checkpoints").glob("step-*/state.json"):
        file.write_text("{}")
    failed = run(*words(other), before=fork_ranks)
    assert failed.wait() == 6
    log = other.run.path / "modules" / "01" / "logs" / "train.log"
    assert "module 1: failed (exit 6): bigincubate: every checkpoint" in failed.out
    assert f"log: {log}" in failed.out
    assert "every checkpoint" in log.read_text()
    assert same_weights(plain, other, "incubate", 0)
    assert "fine-tuning" not in failed.out
    assert failed.err.startswith("bigincubate: ")
    assert failed.err.count("\n") == 1


def test_module_whose_folder_cannot_be_made_does_not_stop_the_others(plain: Any, tmp_path: Path) -> None:
    other = after_the_meta_model(plain, tmp_path / "run")
    (other.run.path / "modules").mkdir()
    (other.run.path / "modules" / "00").write_text("in the way")
    failed = run("run", other.run.recipe_file, "--run-dir", other.run.path, "--jobs", 1, before=fork_ranks)
    assert failed.wait() == 3
    assert f"module 0: failed (exit 3): {other.run.path / 'modules' / '00'}" in failed.out
    assert same_weights(plain, other, "incubate", 1)


# ------------------------------------------------------------------------------------------------ what is shown


def test_terminal_gets_a_live_bar_for_each_phase(plain: Any) -> None:
    screen = io.StringIO()
    graph = build_job_graph(plain.rows, baseline=False)[:2]
    with ProgressReporter(Console(file=screen, force_terminal=True, width=160)) as reporter:
        for job in graph:
            reporter.started(job)
        folders = [(job, plain.run.phase(job.phase, job.module)) for job in graph]
        reporter.update(folders)
        reporter.done(graph[0], {"metrics": {"top1": 97.25}})
        reporter.failed(graph[1], 5, "bigincubate: not finite", Path("train.log"))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "meta model" in shown
    assert "150/150 steps" in shown
    assert re.search(r"module 0 .*loss \d\.\d{3}  \d+ images/s", shown)
    assert "top-1 97.25%" in shown
    assert "module 0: failed (exit 5): bigincubate: not finite\n  log: train.log" in shown.replace("\r", "")


# ------------------------------------------------------------------------------------------------ the graph


def test_graph_is_meta_model_then_modules_then_fine_tuning(plain: Any) -> None:
    graph = {job.key: job for job in build_job_graph(plain.rows, baseline=True)}
    assert list(graph) == ["pretrain", "incubate/0", "incubate/1", "finetune", "end_to_end"]
    assert graph["pretrain"].needs == graph["end_to_end"].needs == ()
    assert graph["incubate/1"].needs == ("pretrain",)
    assert graph["finetune"].needs == ("pretrain", "incubate/0", "incubate/1")
    assert "end_to_end" not in {job.key for job in build_job_graph(plain.rows, baseline=False)}


class Started:
    """Stands for a process: what it was given, and an exit code at once, with a result where that is 0."""

    def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
        self.command, self.env = command, env
        everything.append(self)

    def poll(self) -> int:
        code = codes.get(self.module, 0)
        if code == 0:
            phase: Any = self.command[self.command.index("--phase") + 1]
            run_dir = RunDir(Path(self.command[self.command.index("--run-dir") + 1]))
            folder = run_dir.phase(phase, int(self.module) if self.module != "-" else None)
            folder.write_result(make_result())
        return code

    @property
    def module(self) -> str:
        return self.command[self.command.index("--module") + 1] if "--module" in self.command else "-"


everything: list[Started] = []
codes: dict[str, int] = {}


def executed(harness: Any, monkeypatch: pytest.MonkeyPatch, jobs: int = 2, nproc: int = 1, **ends: int) -> Exit:
    everything.clear()
    codes.clear()
    codes.update({key.removeprefix("m"): code for key, code in ends.items()})
    monkeypatch.setattr(ranks, "Popen", Started)
    monkeypatch.setattr(local, "can_fork", lambda nproc, gpus: False)
    with ProgressReporter(Console(quiet=True)) as reporter:
        return LocalRunner(harness.run, jobs, reporter, nproc, patience=0).execute(
            build_job_graph(harness.rows, baseline=False)
        )


@pytest.mark.parametrize(
    ("ends", "expected", "started"),
    [
        ({}, Exit.DONE, 4),
        ({"m0": 5}, Exit.NON_FINITE, 3),
        ({"m0": 1}, Exit.ENVIRONMENT, 3),
        ({"m1": -9}, Exit.ENVIRONMENT, 3),
        ({"m0": 7}, Exit.LOCKED, 3),
        ({"m1": 75}, Exit.PREEMPTED, 3),
    ],
)
def test_exit_code_is_that_of_the_first_that_failed(
    harness: Harnesses, monkeypatch: pytest.MonkeyPatch, ends: dict[str, int], expected: Exit, started: int
) -> None:
    assert executed(harness(), monkeypatch, **ends) is expected
    assert len(everything) == started


def test_next_job_starts_without_waiting(harness: Harnesses, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher sleeps only while jobs run: not between a job that has ended and the next one, nor at the end."""

    def asleep(seconds: float) -> None:
        pytest.fail("every job ends at once")

    monkeypatch.setattr(local.time, "sleep", asleep)
    assert executed(harness(), monkeypatch, jobs=1) is Exit.DONE
    assert len(everything) == 4


def test_resumed_phase_computes_with_as_many_threads(harness: Harnesses, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number may change the last bit of a sum: it follows from the graph, not from what happens to run."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    resumed = harness()
    executed(resumed, monkeypatch)
    whole = {process.module: process.env["OMP_NUM_THREADS"] for process in everything}
    assert whole == {"-": "8", "0": "4", "1": "4"}
    for place in ("modules/01", "finetune"):
        (resumed.run.path / place / "DONE").unlink()
    executed(resumed, monkeypatch)
    rest = {process.module: process.env["OMP_NUM_THREADS"] for process in everything}
    assert rest == {"1": "4", "-": "8"}


@pytest.mark.parametrize(
    ("visible", "nproc", "expected"),
    [
        ("0,1,2", 1, {"-": {"0"}, "0": {"0"}, "1": {"1"}}),  # modules in parallel, each on a GPU of its own
        ("4,5,6,7", 2, {"-": {"4,5"}, "0": {"4,5"}, "1": {"6,7"}}),
        ("GPU-a,GPU-b", 2, {"-": {"GPU-a,GPU-b"}, "0": {"GPU-a,GPU-b"}, "1": {"GPU-a,GPU-b"}}),
        ("3", 1, {"-": {"3"}, "0": {"3"}, "1": {"3"}}),
        ("", 1, {"-": {""}, "0": {""}, "1": {""}}),
    ],
)
def test_phases_in_parallel_get_different_gpus(
    visible: str, nproc: int, expected: dict[str, set[str]], harness: Harnesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    executed(harness(), monkeypatch, nproc=nproc)
    found: dict[str, set[str]] = {}
    for process in everything:
        found.setdefault(process.module, set()).add(process.env["CUDA_VISIBLE_DEVICES"])
    assert found == expected


def test_ranks_of_a_phase_share_its_threads(harness: Harnesses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    executed(harness(), monkeypatch, nproc=3)
    threads = [(process.module, process.env["OMP_NUM_THREADS"]) for process in everything]
    assert threads == [("-", "2")] * 3 + [("0", "1")] * 3 + [("1", "1")] * 3 + [("-", "2")] * 3


def test_stop_signals_while_a_line_is_printed_do_not_repeat_it(tmp_path: Path) -> None:
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            signal.raise_signal(signal.SIGINT)
            return super().write(text)

    out = Interrupted()
    runner = LocalRunner(RunDir(tmp_path), 1, ProgressReporter(Console(file=out)))
    before = signal.signal(signal.SIGINT, runner._stop)
    try:
        runner.reporter.say("a line")
    finally:
        signal.signal(signal.SIGINT, before)
    assert out.getvalue() == "a line\n"
    assert runner.stop_requested
