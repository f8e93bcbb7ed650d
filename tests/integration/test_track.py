"""Trackers: what is sent, what identifies a phase, and that a failing tracker does not affect a phase."""

from __future__ import annotations

import csv
import importlib.machinery
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import TrainingHarness
from tracked_runs import KEYS, finish, finished_run, log, logged, make_run, phase_of

from bigincubate.errors import ConfigError, LockedError, MissingDependencyError
from bigincubate.files import append_json_line, read_json
from bigincubate.interchange.trackers import background
from bigincubate.interchange.trackers.base import Row, TrackedPhase
from bigincubate.interchange.trackers.registry import make_tracker
from bigincubate.interchange.trackers.replay import Replay, follow, tracked_phase
from bigincubate.storage.lease import acquire_lease
from bigincubate.storage.run_directory import RunDir

Call = Callable[..., tuple[int, str, str]]


class Memory:
    """A tracker that keeps the first value of each step in memory."""

    def __init__(self) -> None:
        self.steps: dict[str, list[tuple[int, float]]] = {}
        self.summaries: dict[str, Mapping[str, float]] = {}
        self.configs: dict[str, Mapping[str, Any]] = {}
        self.open_records = 0

    def open(self, phase: TrackedPhase) -> MemoryRecord:
        self.open_records += 1
        self.configs[phase.id] = phase.config
        return MemoryRecord(self, phase)

    def describe(self, group: str) -> str:
        return group


class MemoryRecord:
    def __init__(self, tracker: Memory, phase: TrackedPhase) -> None:
        self.tracker, self.phase = tracker, phase

    def append(self, rows: Sequence[Row]) -> int:
        recorded = self.tracker.steps.setdefault(self.phase.id, [])
        missing = [row for row in rows if row["step"] not in dict(recorded)]
        recorded += [(row["step"], row["train/loss"]) for row in missing]
        return len(missing)

    def finish(self, summary: Mapping[str, float]) -> None:
        self.tracker.summaries[self.phase.id] = summary

    def close(self) -> None:
        self.tracker.open_records -= 1


def replay(run: RunDir, memory: Memory, keys: Sequence[str] | None = None) -> None:
    with Replay(run, "memory", memory, keys) as started:
        started.update()


def ids(run: RunDir) -> dict[str, str]:
    rows = [row for row in run.planned_rows if row["key"] in KEYS]
    return {row["key"]: tracked_phase(run, run.load_recipe(), row).id for row in rows}


# ------------------------------------------------------------------------------------------------ what is sent


def test_finished_run_is_sent_once_however_often_it_is_replayed(tmp_path: Path) -> None:
    run, memory = finished_run(tmp_path / "run"), Memory()
    for _ in range(2):
        replay(run, memory)
        assert {id[11:-9] for id in memory.steps} == {"pretrain", "incubate-0", "incubate-1", "finetune"}
        for points in memory.steps.values():
            assert points == [(step, 1 / step) for step in (2, 4, 6, 8)]
        assert memory.open_records == 0
    assert all(each["result/top1"] == 91.5 and each["result/steps"] == 8 for each in memory.summaries.values())
    config = memory.configs[ids(run)["incubate/1"]]
    settings = run.load_recipe().settings("incubate").flat()
    assert config == {**config, **settings, "phase": "incubate/1", "data.digest": "d" * 64}


def test_incomplete_last_line_is_sent_when_it_is_complete(tmp_path: Path) -> None:
    run, memory = make_run(tmp_path / "run"), Memory()
    log(run, "pretrain", 2)
    complete = phase_of(run, "pretrain").metrics.read_text()
    with Replay(run, "memory", memory) as started:
        for end in ('{"step": 4, "train/lo', '{"step": 4, "train/loss": 0.25}\n'):
            phase_of(run, "pretrain").metrics.write_text(complete + end)
            started.update()
            assert not started.finished
            yielded = memory.steps[ids(run)["pretrain"]]
            assert yielded == ([(2, 0.5)] if end.endswith("lo") else [(2, 0.5), (4, 0.25)])
    assert memory.summaries == {}


def test_rolled_back_steps_are_not_sent_again(tmp_path: Path) -> None:
    run, memory = make_run(tmp_path / "run"), Memory()
    log(run, "pretrain", 2, 4, 6)
    replay(run, memory)
    phase_of(run, "pretrain").metrics.unlink()
    log(run, "pretrain", 2)
    log(run, "pretrain", 4, 6, 8, loss=2.0)
    replay(run, memory)
    assert memory.steps[ids(run)["pretrain"]] == [(2, 0.5), (4, 0.25), (6, 1 / 6), (8, 0.25)]


def test_follow_ends_with_the_last_phase(tmp_path: Path) -> None:
    run, memory = make_run(tmp_path / "run"), Memory()
    waits: list[str] = []

    def wait() -> bool:
        key = KEYS[len(waits) // 2]
        if len(waits) % 2:
            finish(run, key)
        else:
            log(run, key, 2, 4)
        waits.append(key)
        return False

    with Replay(run, "memory", memory) as started:
        follow(started, wait)
    assert len(waits) == 2 * len(KEYS)
    assert sorted(memory.summaries) == sorted(ids(run).values())


def test_baseline_that_was_not_requested_is_not_waited_for(tmp_path: Path) -> None:
    run, memory = finished_run(tmp_path / "run"), Memory()
    with Replay(run, "memory", memory) as started:
        started.update()
        assert started.finished
        log(run, "end_to_end", 2)
        started.update()
        assert not started.finished
    assert len(memory.steps) == len(KEYS) + 1


def test_two_processes_do_not_send_the_same_phase(tmp_path: Path) -> None:
    run, memory = finished_run(tmp_path / "run"), Memory()
    with acquire_lease(run.path / "trackers/leases/memory-incubate-0"):
        with pytest.raises(LockedError, match="belongs to process"):
            replay(run, memory)
        replay(run, memory, ["finetune"])
    assert ids(run)["incubate/0"] not in memory.steps
    replay(run, memory)
    assert len(memory.steps) == len(KEYS)


# ------------------------------------------------------------------------------------------------ identity


def test_moved_or_copied_run_has_the_same_ids(tmp_path: Path) -> None:
    run, memory = finished_run(tmp_path / "run"), Memory()
    replay(run, memory)
    shutil.copytree(run.path, tmp_path / "copy")
    moved = RunDir(run.path.rename(tmp_path / "elsewhere"))
    moved.log_event("collected")
    for other in (moved, RunDir(tmp_path / "copy")):
        log(other, "finetune", 10)
        replay(other, memory)
    assert len(memory.steps) == len(KEYS)
    assert [step for step, _ in memory.steps[ids(moved)["finetune"]]] == [2, 4, 6, 8, 10]


def test_another_run_or_another_recipe_has_other_ids(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    assert len({*ids(first).values(), *ids(second).values()}) == 2 * len(KEYS)
    shutil.copytree(first.path, tmp_path / "copy")
    copy = RunDir(tmp_path / "copy")
    (copy.path / "plan.json").unlink()
    changed = make_run(copy.path, "finetune.train.lr=0.5")
    shutil.copy(make_run(tmp_path / "new", "finetune.train.lr=0.5").path / "plan.json", changed.path)
    assert {key for key in KEYS if ids(first)[key] != ids(changed)[key]} == {"finetune"}


# ------------------------------------------------------------------------------------------------ CSV


def read_csv(file: Path) -> dict[int, dict[str, float]]:
    with file.open() as lines:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(lines)]
    return {int(row.pop("step")): row for row in rows}


def test_csv_has_the_log_of_a_trained_phase(harness: Callable[..., TrainingHarness], call: Call) -> None:
    trained = harness("train.max_steps=4")
    trained.train("pretrain")
    code, out, err = call("track", trained.run.path, "--to", "csv")
    assert (code, err) == (0, "")
    folder = Path(out.splitlines()[-1].removeprefix("CSV files: "))
    assert folder.parent == trained.run.path / "trackers/csv"
    assert read_csv(folder / "pretrain.csv") == logged(trained.run, "pretrain")
    about = read_json(folder / "pretrain.json") or {}
    assert about["config"]["train.max_steps"] == 4
    result = trained.run.phase("pretrain").result or {}
    assert about["summary"]["result/top1"] == result["metrics"]["top1"]
    assert call("track", trained.run.path, "--to", "csv")[1].startswith(
        "meta model: finished, 2 steps, 0 of them new\n"
    )
    assert not (trained.run.path / "trackers/csv" / folder.name / "finetune.csv").exists()


def test_csv_follows_the_log_and_keeps_its_folder_if_the_run_is_renamed(tmp_path: Path, call: Call) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    log(run, "pretrain", 2, 4)
    append_json_line(phase_of(run, "pretrain").metrics, {"step": 6, "train/loss": float("nan"), "odd, tag": 1.0})
    assert call("track", run.path, "--to", "csv", "--out", out)[0] == 0
    (file,) = out.glob("*/pretrain.csv")
    assert file.read_text().splitlines()[0] == 'step,train/loss,perf/images_per_sec,val/top1,"odd, tag"'
    assert file.read_text().splitlines()[-1] == "6,nan,,,1.0"
    run = RunDir(run.path.rename(tmp_path / "renamed"))
    phase_of(run, "pretrain").metrics.unlink()  # rolled back
    log(run, "pretrain", 2, 4, loss=3.0)
    log(run, "finetune", 2)
    assert call("track", run.path, "--to", "csv", "--out", out)[0] == 0
    assert [path.parent for path in out.glob("*/*.csv")] == [file.parent] * 2
    assert read_csv(file) == logged(run, "pretrain")


# ------------------------------------------------------------------------------------------------ the command


def test_track_follow_ends_with_ctrl_c(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log(run, "pretrain", 2, 4)
    command = [sys.executable, "-m", "bigincubate", "track", str(run.path), "--to", "csv", "--follow"]
    # a shell ignores Ctrl-C in background jobs, such as `make test &`, and their processes inherit that
    reset = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=reset)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip().removeprefix("CSV files: "))
    while not (folder / "pretrain.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (130, 1)
    assert read_csv(folder / "pretrain.csv") == logged(run, "pretrain")
    owners = sorted((run.path / "trackers/leases/csv-pretrain/owners").iterdir())
    assert [owner.read_text() for owner in owners] == [""]  # released


@pytest.mark.parametrize(("name", "package"), [("wandb", "W&B"), ("mlflow", "MLflow")])
def test_missing_package_is_one_line_with_the_command(
    name: str, package: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, name, None)
    code, _, err = call("track", run.path, "--to", name)
    assert code == MissingDependencyError.code
    assert err.startswith(f"bigincubate: this needs {package} (")
    assert err.endswith(f"); install it: pip install {name}\n")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--to", "tensorboard"), 2, "--to tensorboard: expected one of wandb, mlflow, csv"),
        ((), 2, "Missing option '--to'. (see --help)"),
        (("--to", "csv", "--out", "http://localhost:5000"), 2, "csv takes a folder, not a URI"),
        (("--to", "csv", "--out", __file__), 2, "is a file; give a folder with --out"),
        (("--to", "mlflow", "--out", "folder"), 2, "folder: MLflow takes a tracking URI"),
    ],
)
def test_wrong_option_is_one_line(words: tuple[str, ...], code: int, message: str, tmp_path: Path, call: Call) -> None:
    found, _, err = call("track", finished_run(tmp_path / "run").path, *words)
    assert (found, err.count("\n")) == (code, 1)
    assert message in err


def test_track_refuses_other_folders_and_accepts_an_untrained_run(tmp_path: Path, call: Call) -> None:
    (tmp_path / "empty").mkdir()
    assert "is not a run directory" in call("track", tmp_path / "empty", "--to", "csv")[2]
    assert call("track", make_run(tmp_path / "run").path, "--to", "csv")[:2] == (0, "no metrics yet\n")


# ------------------------------------------------------------------------------------------------ while training


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def write_package(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a package that the tracker process imports instead of W&B."""
    (folder / "wandb").mkdir()
    (folder / "wandb/__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(background.__file__).parents[3]}")


def test_trackers_of_a_recipe_receive_a_phase_while_it_trains(
    harness: Callable[..., TrainingHarness], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "PATIENCE_S", 300.0)
    monkeypatch.setenv("PYTHONPATH", str(Path(background.__file__).parents[3]))
    trained = harness("train.max_steps=4", 'log.trackers=["csv"]')
    trained.train("pretrain")
    (file,) = trained.run.path.glob("trackers/csv/*/pretrain.csv")
    assert read_csv(file) == logged(trained.run, "pretrain")
    assert (read_json(file.with_suffix(".json")) or {})["summary"]["result/steps"] == 4
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (None, "the package is not installed (pip install wandb)"),
        ("def init(**_): raise RuntimeError('no disk')\nSettings = dict", "ended with code 3: wandb: no disk"),
        ("import os; os._exit(7)", "ended with code 7: no message"),
        ("while True: pass", "not finished 1 s after the phase"),
    ],
    ids=["missing", "raises", "dies", "hangs"],
)
def test_tracker_that_fails_gives_one_warning(
    code: str | None,
    problem: str,
    tmp_path: Path,
    harness: Callable[..., TrainingHarness],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "PATIENCE_S", 1.0 if problem.startswith("not finished") else 300.0)
    if code is None:
        monkeypatch.setattr(background.importlib.util, "find_spec", lambda name: None)
    else:
        write_package(tmp_path, code, monkeypatch)
    trained = harness("train.max_steps=4", 'log.trackers=["wandb"]')
    result = trained.train("pretrain")
    (warning,) = warnings(caplog)
    assert warning.startswith(f"log.trackers: wandb: {problem}; training is not affected; send what is missing with:")
    assert result["steps"] == 4
    assert [attempt["state"] for attempt in trained.run.phase("pretrain").read_attempts()] == ["done"]


def test_mlflow_needs_a_server_while_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(
        background.importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None, origin="x")
    )
    with background.track_in_background(run, phase_of(run, "pretrain"), "pretrain", ["mlflow"]):
        pass
    (warning,) = warnings(caplog)
    assert "mlflow: the variable MLFLOW_TRACKING_URI is not set" in warning


def test_failed_phase_does_not_wait_for_its_tracker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracker process ends by itself after one more update."""
    run = make_run(tmp_path / "run")
    log(run, "pretrain", 2)
    monkeypatch.setenv("PYTHONPATH", str(Path(background.__file__).parents[3]))
    waited: list[float] = []
    monkeypatch.setattr(background.TrackerProcess, "wait", lambda self, seconds: waited.append(seconds))
    started: list[Any] = []
    create = background.subprocess.Popen

    def keep(*words: Any, **options: Any) -> Any:
        started.append(create(*words, **options))
        return started[0]

    monkeypatch.setattr(background.subprocess, "Popen", keep)
    with (
        pytest.raises(ValueError, match="a fault"),
        background.track_in_background(run, phase_of(run, "pretrain"), "pretrain", ["csv"]),
    ):
        raise ValueError("a fault")
    assert waited == []
    assert started[0].wait(60) == 0
    (file,) = run.path.glob("trackers/csv/*/pretrain.csv")
    assert read_csv(file) == logged(run, "pretrain")
    assert warnings(caplog) == []


def test_unknown_tracker_in_a_recipe_is_refused() -> None:
    from bigincubate.config import load_recipe

    with pytest.raises(ConfigError, match=r"log\.trackers.*wandb.*mlflow.*csv"):
        load_recipe("digits", ['log.trackers=["tensorboard"]'])


def test_trackers_are_made_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert make_tracker("csv", run).describe("a-1") == f"CSV files: {run.path}/trackers/csv/a-1"
