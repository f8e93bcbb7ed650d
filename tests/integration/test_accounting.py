"""What Slurm's accounting says of a run's jobs, and where the report shows it. Needs no Slurm."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigincubate.errors import Exit
from bigincubate.launchers.slurm.submission_log import Submission, SubmissionLog
from bigincubate.report.accounting import FORMAT, parse_accounting, parse_size, parse_time, query_usage
from bigincubate.storage.run_directory import RunDir

# With --duplicates: module 1 was requeued once, modules 1002 and 1003 wait, and job 12 of 2019 was another program's.
ANSWER = """\
sacct: this cluster is drained on Friday
12|COMPLETED|50|1|00:40.000|100||0|xhpl
12.0|COMPLETED|50|1|00:40.000|100|90G|0|xhpl
12|COMPLETED|1800|2|03:00:00|14400||720000|bigincubate-pretrain
12.batch|COMPLETED|1800|1|00:01.000|7200|4096K|300000|batch
12.extern|COMPLETED|1800|2|00:00.002|14400|0||extern
12.0|COMPLETED|1790|2|02:59:58|14320|2M|710000|python
13_1|REQUEUED|600|1|02:03.456|600||0|bigincubate-incubate
13_1.batch|CANCELLED|600|1|02:03.456|600|3G|0|batch
13_1|CANCELLED by 1000|3000|1|1-02:03:04|187568||0|a run-incubate
13_1.0|CANCELLED|3000|1|1-02:03:04|187568|1536M|0|python
14_1|RUNNING|36|1|00:00:00|36|||bigincubate-incubate+1000
14_[2-3]|PENDING|0|0|00:00:00|0|||bigincubate-incubate+1000
99|COMPLETED|3600|1|01:00:00|3600||0|bigincubate-gate
15|PENDING|0|0|00:00:00|0|||bigincubate-gate
"""
JOBS = {"12": "pretrain", "13": "incubate", "14": "incubate", "15": "gate"}


def test_attempts_are_those_that_have_begun() -> None:
    first, requeued, canceled, running = parse_accounting(ANSWER, JOBS)
    assert [each.key for each in (first, requeued, canceled, running)] == [
        *("pretrain", "incubate/1", "incubate/1", "incubate/1001")
    ]
    assert (first.node_seconds, first.cpu_seconds, first.allocated_cpu_seconds) == (3600, 10800, 14400)
    assert (first.memory, first.energy) == (4 * 2**20, 720000)
    assert (requeued.memory, canceled.memory) == (3 * 2**30, 1.5 * 2**30)
    assert [each.ended for each in (first, requeued, canceled, running)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("02:03.456", 123.456), ("01:02:03", 3723), ("1-02:03:04", 93784), ("00:00:00", 0), ("", 0), ("INVALID", 0)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "size"), [("1234K", 1234 * 1024), ("1.5G", 1.5 * 2**30), ("512", 512), ("0", 0), ("", 0), ("16?", 0)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.fixture
def sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a program of this name, which records its arguments in the returned file."""
    asked, folder = tmp_path / "asked", tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def install(answer: str = "", error: str = "", code: int = 0) -> Path:
        folder.mkdir(exist_ok=True)
        script = f'echo "$*" >>{shlex.quote(str(asked))}\nprintf %s {shlex.quote(answer)}\n'
        script += f"printf %s {shlex.quote(error)} >&2\nexit {code}\n"
        (folder / "sacct").write_text(f"#!/bin/sh\n{script}")
        (folder / "sacct").chmod(0o755)
        return asked

    return install


def submitted(run: RunDir, *jobs: dict[str, Any]) -> RunDir:
    run.path.mkdir(exist_ok=True)
    kinds: dict[str | None, str] = {"99": "gate", None: "gate"} | dict[str | None, str](JOBS.items())
    SubmissionLog(run, [Submission(kinds[job["job"]], "name", **job) for job in jobs]).write()
    return run


def test_slurm_is_asked_once_for_the_jobs_of_the_run(sacct: Callable[..., Path], tmp_path: Path) -> None:
    asked = sacct(ANSWER)
    run = submitted(RunDir(tmp_path / "run"), *({"job": job, "cluster": None} for job in [*JOBS, None]))
    usage = query_usage(run)
    assert asked.read_text().splitlines() == [
        f"--allusers --duplicates --noheader --parsable2 --noconvert --format={FORMAT} --jobs=12,13,14,15"
    ]
    assert list(usage) == ["pretrain", "incubate/1", "incubate/1001"]
    assert usage["pretrain"].node_hours == 1
    assert usage["pretrain"].cpu_efficiency == 0.75
    module = usage["incubate/1"]
    assert (module.node_hours, module.memory, module.energy, len(module.attempts)) == (1, 3 * 2**30, 0, 2)
    assert module.cpu_efficiency == pytest.approx((123.456 + 93784) / (600 + 187568))
    assert usage["incubate/1001"].cpu_efficiency is None


def test_each_cluster_is_asked_for_its_jobs(sacct: Callable[..., Path], tmp_path: Path) -> None:
    asked = sacct(ANSWER)
    query_usage(submitted(RunDir(tmp_path / "run"), {"job": "12"}, {"job": "13", "cluster": "west"}))
    assert [line.split("--jobs=")[1] for line in asked.read_text().splitlines()] == ["12", "13 --clusters=west"]


def test_run_without_accounting_has_no_usage(
    sacct: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = sacct(error="Slurm accounting storage is disabled\n", code=1)
    assert query_usage(RunDir(tmp_path / "local")) == {}  # nothing was submitted
    assert query_usage(submitted(RunDir(tmp_path / "run"), {"job": None, "cluster": None})) == {}
    assert not asked.exists()
    run = submitted(RunDir(tmp_path / "run"), {"job": "12", "cluster": None})
    assert query_usage(run) == {}
    assert asked.exists()
    sacct("")
    assert query_usage(run) == {}
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert query_usage(run) == {}


def test_report_shows_what_the_jobs_used(
    harness: Callable[..., Any], sacct: Callable[..., Path], bigincubate: Any
) -> None:
    made = harness("train.max_steps=2")
    made.train("pretrain")
    submitted(made.run, {"job": "12", "cluster": None}, {"job": "13", "cluster": None}, {"job": "99", "cluster": None})
    pages = []
    for answer in (ANSWER, ""):
        sacct(answer)
        assert bigincubate("report", made.run.path).returncode == Exit.DONE
        pages.append((made.run.path / "report.html").read_text())
    section = pages[0].partition("<h2>Slurm jobs</h2>")[2].partition("<h2>")[0]
    rows = [row.split("</tr>")[0] for row in section.split("<tr>")[1:]]
    assert [row.split("</td>")[0] for row in rows[1:]] == [
        f"<td>{name}" for name in ("meta model", "module 1", "gates", "all")
    ]
    for shown in (">1.00</data>", ">75 %</data>", ">4.19 MB</data>", ">720 kJ</data>", "<td>1</td>"):
        assert shown in rows[1]
    assert ">3.00</data>" in rows[-1]
    assert "Slurm jobs" not in pages[1]
