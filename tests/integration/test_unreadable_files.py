"""Files of a run that cannot be read: finished work is neither repeated nor removed, and the file is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from denied import deny, solution_for

from bigincubate.errors import SystemResourceError
from bigincubate.files import append_json_line, write_json
from bigincubate.launchers.slurm.scheduler import _is_valid
from bigincubate.launchers.slurm.submission_log import SubmissionLog
from bigincubate.planning.job_graph import build_job_graph
from bigincubate.report.page import render_report
from bigincubate.report.run_data import read_run
from bigincubate.report.status import run_status
from bigincubate.report.timeline import build_timeline
from bigincubate.storage.checkpoint_verification import find_committed
from bigincubate.storage.lease import acquire_lease, current_owner

Harnesses = Callable[..., Any]
SOLUTION = "change its permissions, then run the same command again"


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and "logs" not in file.parts}


@pytest.fixture
def made(harness: Harnesses) -> Any:
    """A run with a finished meta model."""
    made = harness("train.max_steps=5")
    made.train("pretrain")
    return made


@pytest.mark.parametrize("denied", ["DONE", "artifact", "artifact/manifest.json", "artifact/weights.safetensors"])
def test_phase_with_an_unreadable_result_is_not_submitted_again(
    denied: str, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = made.run.phase("pretrain"), contents(made.run.path)
    job = next(job for job in build_job_graph(made.rows, baseline=False) if job.key == "pretrain")
    deny(monkeypatch, folder.path / denied)
    with pytest.raises((OSError, SystemResourceError), match="Permission denied"):
        _is_valid(job, made.run)
    monkeypatch.undo()
    assert contents(made.run.path) == before
    assert _is_valid(job, made.run)


@pytest.mark.parametrize(
    ("denied", "phase", "module"),
    [("plan.json", "incubate", 0), ("meta/artifact/manifest.json", "incubate", 0), ("meta/DONE", "pretrain", None)],
)
def test_phase_that_reads_an_unreadable_file_names_it(
    denied: str,
    phase: str,
    module: int | None,
    made: Any,
    call: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deny(monkeypatch, made.run.path / denied)
    code, out, err = call(*made.command(phase, module))
    assert (code, out) == (3, "")
    assert err.splitlines()[-1].startswith(f"bigincubate: {made.run.path / denied}: Permission denied")
    monkeypatch.undo()
    assert made.train(phase, module)["steps"] == 5


@pytest.mark.parametrize("command", ["status", "verify"])
def test_damaged_plan_is_not_called_missing(command: str, made: Any, call: Callable[..., Any]) -> None:
    plan = made.run.path / "plan.json"
    plan.write_text("damaged")
    code, out, err = call(command, made.run.path)
    assert (code, out) == (4, "")
    again = f"bigincubate run {made.run.recipe_file} --run-dir {made.run.path}"
    assert err == f"bigincubate: {plan} is damaged; remove it, and this command writes it again: {again}\n"


@pytest.mark.parametrize("denied", ["", "step-00000005", "step-00000005/rank-00000.safetensors"])
@pytest.mark.parametrize("command", [("list",), ("verify",), ("prune", "--keep", "1")])
def test_unreadable_checkpoint_is_neither_pruned_nor_called_damaged(
    command: tuple[str, ...], denied: str, made: Any, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (name, *options) = made.run.phase("pretrain").checkpoints, command
    before = sorted(folder.iterdir())
    deny(monkeypatch, folder / denied)
    code, _, err = call("checkpoint", name, made.run.path, *options)
    assert code == 3
    assert err.count("\n") == 1
    file = folder / denied / "COMMITTED" if denied == "step-00000005" else folder / denied
    assert err == f"bigincubate: {file}: Permission denied; {solution_for(file, folder / denied)}\n"
    monkeypatch.undo()
    assert sorted(folder.iterdir()) == before


def test_lease_whose_owner_is_unreadable_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with acquire_lease(tmp_path) as lease:
        assert lease.path is not None
        with monkeypatch.context() as patch:
            deny(patch, lease.path)
            for claim in (lambda: current_owner(tmp_path), lambda: acquire_lease(tmp_path).__enter__()):
                with pytest.raises(PermissionError):
                    claim()
        assert lease.is_held()


LOGS = ["events.jsonl", "meta/metrics.jsonl", "meta/requeues.jsonl"]
ROWS = [
    *(5, [1], None, {"time": 1}, {"step": "5", "train/loss": 1.0}, {"step": 5, "train/loss": "1"}),
    *({"step": 10**310}, {"step": 5, "train/loss": 10**310}),
    {"time": "1", "event": "done"},
    *({"time": time, "event": "baseline"} for time in (10**310, float("nan"), float("inf"))),
    {"time": 1.0, "event": []},
    {"time": 1.0, "job": "1", "code": "1", "checkpoint": None, "reason": "exit code 1"},
    {"time": 1.0, "job": "1", "code": 1, "checkpoint": [], "reason": "exit code 1"},
]
DAMAGED = "\n".join(['{"step"', "\0\0", "[" * 1500, *map(json.dumps, ROWS)]) + "\n"  # too deep for a parser


@pytest.fixture
def requeued(made: Any) -> Any:
    """The same run, if the job of the meta model was requeued before it was done."""
    folder = made.run.phase("pretrain")
    (attempt,) = folder.read_attempts()
    write_json(folder.path / "attempts" / "1.json", attempt | {"state": "preempted"})
    folder.log_requeue(job="1", code=1, checkpoint=None, reason="exit code 1")
    (folder.path / "DONE").unlink()
    return made


@pytest.mark.parametrize("log", LOGS)
@pytest.mark.parametrize("command", ["status", "report"])
def test_damaged_lines_of_logs_are_ignored(log: str, command: str, requeued: Any, call: Callable[..., Any]) -> None:
    run, folder = requeued.run, requeued.run.phase("pretrain")
    before = run.read_events(), folder.read_metrics(), folder.read_requeues()
    assert all(before)
    expected = call(command, run.path)
    assert expected[0] == 0
    with (run.path / log).open("a") as file:
        file.write(DAMAGED)
    assert call(command, run.path) == expected
    assert (run.read_events(), folder.read_metrics(), folder.read_requeues()) == before


@pytest.mark.parametrize(
    "event",
    [
        {"event": "done"},
        {"event": "done", "steps": "5"},
        {"event": "done", "phase": [], "steps": 5},
        {"event": "recipe_changed", "changes": 5},
        {"event": "cancelled", "jobs": [5]},
        {"event": "submitted", "job": "5", "kind": "pretrain", "modules": ["1"]},
        {"event": "partial_assembly", "joined": None},
        {"event": "stragglers", "stragglers": [{}]},
        {"event": "stragglers", "stragglers": [{"rank": 1, "host": "n1", "ratio": 10**400}]},
        {"event": "of_a_later_version", "text": "{"},
        {"event": "baseline", "time": 1e18},
    ],
    ids=str,
)
def test_event_without_the_fields_of_its_kind_is_reported_by_its_kind(event: dict[str, Any], made: Any) -> None:
    append_json_line(made.run.path / "events.jsonl", {"time": 1.0} | event)
    (reported,) = [each for each in build_timeline(read_run(made.run)) if each.time == event.get("time", 1.0)]
    kind = {"baseline": "an end-to-end baseline was requested"}.get(event["event"], event["event"].replace("_", " "))
    assert reported.text == kind
    page = render_report(read_run(made.run), [])
    assert ("unknown" if "time" in event else "1970-01-01 00:00:01") in page


@pytest.mark.parametrize("kind", ["fifo", "folder"])
@pytest.mark.parametrize("log", LOGS)
def test_log_that_is_no_file_is_refused(log: str, kind: str, requeued: Any, call: Callable[..., Any]) -> None:
    file = requeued.run.path / log
    file.unlink()
    os.mkfifo(file) if kind == "fifo" else file.mkdir()
    error = f"bigincubate: {file}: not a file but a folder, pipe or device\n"
    if log != "events.jsonl":  # which the status does not show
        assert call("status", requeued.run.path) == (3, "", error)
    assert call("report", requeued.run.path) == (3, "", error)


def test_unreadable_attempts_are_not_called_missing(
    requeued: Any, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = requeued.run.phase("pretrain").path / "attempts"
    deny(monkeypatch, attempts)
    assert call("status", requeued.run.path) == (3, "", f"bigincubate: {attempts}: Permission denied; {SOLUTION}\n")


@pytest.mark.parametrize("text", ["{}", '{"metrics": 5, "steps": 5, "seconds": 1.0}', '{"metrics": {}, "steps": "5"}'])
@pytest.mark.parametrize("command", ["status", "report", "verify"])
def test_result_without_its_values_is_damaged(command: str, text: str, made: Any, call: Callable[..., Any]) -> None:
    folder = made.run.phase("pretrain")
    (folder.path / "DONE").write_text(text)
    code, out, err = call(command, made.run.path)
    assert (code, err.count("\n")) == ((6, 1) if command == "verify" else (0, 0))
    if command == "verify":
        assert "the phase would resume from its last checkpoint" in out
    for name in ("partial.json", "stragglers.json", "rollback.json"):
        (folder.path / name).write_text('{"joined": 5, "ranks": 5, "to": "5"}')
    assert (folder.result, folder.partial, folder.stragglers, folder.rollback) == (None, None, [], None)


@pytest.mark.parametrize("text", ["{}", None])
def test_phase_whose_result_is_damaged_or_missing_is_not_called_done(text: str | None, made: Any) -> None:
    file = made.run.phase("pretrain").path / "DONE"
    file.write_text(text) if text else file.unlink()
    (row,) = [row for row in run_status(made.run) if row["phase"] == "pretrain"]
    assert (row["state"], row["error"]) == ("failed", "its result (DONE) is missing or damaged")


def test_damaged_plan_is_written_again(made: Any, call: Callable[..., Any]) -> None:
    """Even if only a report would need the value that is damaged."""
    made.run.update_summary()
    plan, summary = made.run.path / "plan.json", (made.run.path / "summary.json").read_bytes()
    whole = plan.read_text()
    content = json.loads(whole)
    del content["target_depths"]
    plan.write_text(json.dumps(content))
    made.run.update_summary()
    assert (made.run.path / "summary.json").read_bytes() == summary
    assert call(*made.command("incubate", 0))[0] == 0
    assert json.loads(plan.read_text()) == json.loads(whole)


def test_checkpoint_after_the_last_step_is_100_percent(made: Any, call: Callable[..., Any]) -> None:
    folder = made.run.phase("pretrain")
    (folder.path / "DONE").unlink()
    (folder.checkpoints / "step-00000005").rename(folder.checkpoints / "step-00000500")
    (row,) = [row for row in run_status(made.run) if row["phase"] == "pretrain"]
    assert (row["step"], row["percent"]) == (500, 100.0)


@pytest.fixture
def copies(made: Any) -> list[Path]:
    """Copies that a user made of checkpoints and of an attempt, and an attempt with the content of another file."""
    folder = made.run.phase("pretrain")
    checkpoints = [folder.checkpoints / name for name in ("step-backup", "step-00000009-backup", "step-0000000005")]
    for copy in checkpoints:
        shutil.copytree(folder.checkpoints / "step-00000005", copy)
    attempts = [folder.path / "attempts" / name for name in ("1-backup.json", "01.json", "7.json", "2.json")]
    for copy in attempts[:3]:
        shutil.copy(folder.path / "attempts/1.json", copy)
    attempts[3].write_text('{"attempt": 2}')
    return [*checkpoints, *attempts]


def test_copies_under_other_names_are_ignored(made: Any, copies: list[Path], call: Callable[..., Any]) -> None:
    found = json.loads(call("status", made.run.path, "--json")[1])[0]
    assert (found["checkpoint"], found["attempts"]) == (5, 1)
    assert SubmissionLog(made.run).newest_checkpoint("pretrain") == 5
    assert call("report", made.run.path)[0] == 0
    listed = call("checkpoint", "list", made.run.phase("pretrain").path, "--json")[1]
    assert [Path(row["path"]).name for row in json.loads(listed)] == ["step-00000004", "step-00000005"]


def test_copies_of_checkpoints_are_neither_counted_nor_removed(
    made: Any, copies: list[Path], call: Callable[..., Any]
) -> None:
    folder = made.run.phase("pretrain")
    assert call("checkpoint", "prune", folder.path, "--keep", "1")[0] == 0
    assert find_committed(folder.checkpoints).keys() == {5}
    (folder.path / "DONE").unlink()
    assert made.train("pretrain")["steps"] == 5
    assert [path.exists() for path in copies] == [True] * len(copies)


@pytest.mark.parametrize("denied", ["", "step-00000005"])
def test_unreadable_checkpoints_are_not_counted_as_missing(
    denied: str, made: Any, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made.run.phase("pretrain").checkpoints / denied
    deny(monkeypatch, path)
    code, out, err = call("status", made.run.path)
    assert (code, out) == (3, "")
    assert err.startswith(f"bigincubate: {path}")
    assert err.count("\n") == 1
    with pytest.raises(PermissionError):
        SubmissionLog(made.run).newest_checkpoint("pretrain")
