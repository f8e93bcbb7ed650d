"""Files of a run with wrong, missing or absurd values: readers raise no other errors than those that users see."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bigincubate.errors import BigincubateError, Exit
from bigincubate.files import append_json_line, write_json
from bigincubate.launchers.slurm.submission_log import Submission, SubmissionLog
from bigincubate.report.accounting import parse_accounting, query_usage
from bigincubate.report.compare import compare_json, compare_page, label_routes
from bigincubate.report.console_tables import compare_table, status_table
from bigincubate.report.page import render_report
from bigincubate.report.run_data import read_run
from bigincubate.report.status import read_plan, run_status
from bigincubate.report.timeline import build_timeline
from bigincubate.storage.lease import current_owner, describe_process
from bigincubate.storage.run_directory import RunDir

WRONG: tuple[Any, ...] = (
    None,
    5,
    -1,
    0,
    0.5,
    "x",
    "\0",
    "\ud800",
    [],
    [5],
    {},
    {"x": 5},
    True,
    1e308,
    10**400,
    float("nan"),
)
STRIDE = 5  # each key gets every fifth of these values
OBJECTS = (
    *("plan.json", "jobs.json", "summary.json", "meta/DONE", "meta/attempts/1.json", "meta/owners/1.json"),
    *(
        "modules/00/partial.json",
        "modules/00/stragglers.json",
        "modules/00/rollback.json",
        "modules/00/start_rate.json",
    ),
)
LINES = ("events.jsonl", "meta/metrics.jsonl", "meta/requeues.jsonl")


@pytest.fixture(scope="module")
def whole(done: Any) -> RunDir:
    """A finished run with every kind of record, all of whose logs have lines."""
    run: RunDir = done.run
    module = run.phase("incubate", 0)
    SubmissionLog(run, [Submission("pretrain", "run-pretrain", "12", modules=(), needs=("11",))]).write()
    straggler: dict[str, Any] = {"rank": 1, "host": "n2", "ratio": 2.5}
    write_json(run.phase("pretrain").path / "owners" / "1.json", describe_process(os.getpid()))
    module.write_stragglers([straggler])
    module.write_rollback(2)
    write_json(module.path / "start_rate.json", {"gflops": 1.0})
    run.phase("pretrain").log_requeue(job="12", code=1, checkpoint=2, reason="exit code 1", nodes="n1")
    events: dict[str, dict[str, Any]] = {
        "stragglers": {"stragglers": [straggler]},
        "rolled_back": {"step": 2, "to": 1},
        "made_again": {"reason": "damaged"},
        "imported": {"source": "x"},
        "collected": {"source": "x"},
        "forked": {"source": "x"},
        "submitted": {"job": "12", "kind": "incubate", "modules": [0, 1]},
        "cancelled": {"jobs": ["12"]},
        "recipe_changed": {"changes": ["a", "b"]},
        "shared_loader": {"made": 1, "sent": 2},
    }
    for event, fields in events.items():
        run.log_event(event, phase="incubate/0", **fields)
    return run


@pytest.fixture
def copied(whole: RunDir, tmp_path: Path) -> RunDir:
    shutil.copytree(whole.path, tmp_path / "run", ignore=shutil.ignore_patterns("artifact", "checkpoints", "tb"))
    return RunDir(tmp_path / "run")


def read_everything(run: RunDir) -> None:
    """Read a run as all reports do. Errors that a user sees as one line are fine."""

    def read_data() -> None:
        run_data = read_run(run, lambda _: None)
        build_timeline(run_data)
        compare_json(label_routes([run_data]))
        compare_table(label_routes([run_data]))

    readers: list[Callable[[], Any]] = [
        lambda: status_table("run", run_status(run, lambda _: None), read_plan(run)),
        read_data,
        lambda: query_usage(run),
        run.update_summary,
        lambda: [current_owner(folder.path) for folder in run.phases],
        lambda: [(folder.partial, folder.stragglers, folder.rollback, folder.start_rate) for folder in run.phases],
    ]
    for read in readers:
        with suppress(BigincubateError):
            read()


def damaged_values(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield an object without each of its keys, and with some wrong values for it, also within its values."""
    for at, (key, value) in enumerate(content.items()):
        if key == "format":  # of a metric: its type is right, and only its text could be wrong
            continue
        yield f"without {key}", {name: each for name, each in content.items() if name != key}
        for wrong in WRONG[at % STRIDE :: STRIDE]:
            yield f"{key} = {wrong!r}", content | {key: wrong}
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, dict) and key not in ("identity", "settings"):
            for what, changed in damaged_values(inner):
                yield f"{key}: {what}", content | {key: [changed, *value[1:]] if isinstance(value, list) else changed}


@pytest.mark.parametrize("name", OBJECTS)
def test_damaged_value_of_an_object_does_not_break_a_report(name: str, copied: RunDir) -> None:
    file = copied.path / name
    content = json.loads(file.read_text())
    for what, changed in (*((repr(wrong), wrong) for wrong in WRONG), *damaged_values(content)):
        file.write_text(json.dumps(changed))
        try:
            read_everything(copied)
        except Exception as error:
            raise AssertionError(f"{name}: {what}") from error


@pytest.mark.parametrize("name", LINES)
def test_damaged_value_of_a_line_does_not_break_a_report(name: str, copied: RunDir) -> None:
    file = copied.path / name
    before = file.read_bytes()
    lines = {json.dumps(sorted(row)): row for row in map(json.loads, before.splitlines())}  # one of each kind
    for row in lines.values():
        for what, changed in damaged_values(row):
            file.write_bytes(before)
            append_json_line(file, changed)
            try:
                read_everything(copied)
            except Exception as error:
                raise AssertionError(f"{name}: {row}: {what}") from error


def test_damaged_values_on_a_page_do_not_break_it(copied: RunDir, call: Callable[..., Any]) -> None:
    """Those that have the right type, in all files at once."""
    meta = copied.phase("pretrain")
    for row in (
        {"step": 3, "train/loss": 1e308, "val/loss": 1e308},
        {"step": 4, "train/loss": float("nan"), "perf/images_per_sec": 1e-29},
    ):
        append_json_line(meta.metrics, row)
    for rate in (float("nan"), float("inf"), -1.0, 0):
        append_json_line(meta.metrics, {"step": 5, "perf/images_per_sec": rate})
    copied.log_event("made_again", phase="\ud800", reason="\ud800 <")
    meta.log_requeue(job="12", code=1, checkpoint=None, reason="\udcff", nodes="\ud800")
    (attempt,) = meta.read_attempts()
    write_json(meta.path / "attempts" / "1.json", attempt | {"host": "\ud800", "error": "\ud800", "state": "failed"})
    (meta.path / "DONE").unlink()
    page = render_report(read_run(copied), [])
    assert "\\ud800" in page
    assert "\\ud800" in page.encode().decode()
    compare_page(label_routes([read_run(copied)])).encode()
    for command in (["status"], ["report"], ["compare"]):
        code, _, err = call(*command, copied.path)
        assert (code, err) == (Exit.DONE, "")


def test_submission_to_the_first_of_several_clusters_is_not_damaged(tmp_path: Path) -> None:
    """`--clusters=a,b` is noted as it is until Slurm has chosen one."""
    run = RunDir(tmp_path)
    submitted = [Submission("pretrain", "x", cluster="a,b"), Submission("gate", "x", "12", needs=("11",))]
    SubmissionLog(run, submitted).write()
    assert SubmissionLog.read(run).jobs == submitted


def test_odd_kind_of_a_job_is_no_pattern() -> None:
    row = "12|COMPLETED|60|1|00:01:00|60|||run-("
    assert [each.key for each in parse_accounting(row, {"12": "("})] == ["("]


def test_damaged_log_of_submissions_is_no_reason_to_submit_again(copied: RunDir, call: Callable[..., Any]) -> None:
    for text in ("", "{", "[5]", '{"jobs": 5}', '{"jobs": [{"job": 5}], "counts": {}, "checkpoints": {}}'):
        (copied.path / "jobs.json").write_text(text)
        code, _, err = call("cancel", copied.path)
        assert code == Exit.ARTIFACT
        assert err.startswith(f"bigincubate: {copied.path}/jobs.json is damaged or of another version; cancel the jobs")
        assert call("report", copied.path)[0] == Exit.DONE
