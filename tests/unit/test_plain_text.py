"""Text from outside (paths, errors, nodes, recipes) is printed as it is: rich reads none of it as markup."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

from bigincubate.cli.app import console as command_console
from bigincubate.launchers.progress import ProgressReporter
from bigincubate.planning.job_graph import Job
from bigincubate.report import console_tables as tables
from bigincubate.tasks.metric import Metric

TEXTS = ["[/dev/sda] failed", "[bold]loud[/bold]", "[/]", ":smiley:", "[link=x]", "\\[x]"]
TOP1 = Metric("top1", "top-1", "%")


def status(text: str) -> Any:
    return status_of(text, {"error": text, "stragglers": None})


def status_of_slow_rank(text: str) -> Any:
    return status_of("phase", {"error": None, "stragglers": [{"rank": 1, "host": text, "ratio": 2.0}]})


def status_of(text: str, last: dict[str, Any]) -> Any:
    row: dict[str, Any] = {
        **{"title": text, "state": text, "job": text, "queue": text, "node": text, "phase": "p", **last},
        **{"step": 1, "steps": 2, "percent": 50.0, "loss": None, "metrics": {}, "headline": "top1", "unit": text},
        **{"samples_per_sec": None, "eta_seconds": None, "restarts": 0, "checkpoint": None, "partial": None},
    }
    plan = {"rows": [{"key": "p", "metrics": [{"name": "top1", "title": text, "unit": "%"}]}]}
    return tables.status_table(text, [row], plan)


def checkpoints(text: str) -> Any:
    row = {"path": text, "step": 1, "ranks": 1, "bytes": 1, "committed": False, "problem": None, "time": 0.0}
    return tables.checkpoint_table(text, [row])


def comparison(text: str) -> Any:
    spent = {"epochs": 1.0, "seen": 1, "flops": 1, "seconds": 1.0}
    last = SimpleNamespace(metrics=[TOP1], unit=text, result={"metrics": {"top1": 1.0}}, headline=TOP1)
    last.assembled = None
    route = SimpleNamespace(last=last, meta=None, hybrid_range=[], assembled=None, spent=spent, missing=[text])
    return tables.compare_table([(text, route)])  # type: ignore[list-item]


def summary(text: str) -> Any:
    result = {"metrics": {"top1": 1.0}, "unit": text, "seconds": 1.0, "seen": 1, "flops": 1}
    planned: Any = [SimpleNamespace(key="pretrain", metrics=[TOP1])]
    empty: dict[str, Any] = {"modules": [], "assembled": None, "finetune": None, "end_to_end": None}
    return tables.summary_table(text, {"meta": result, **empty}, planned)


def plan(text: str) -> Any:
    zeros = ("parameters", "trainable", "forward_flops", "training_flops", "activation_bytes", "optimizer_bytes")
    cost = dict.fromkeys((*zeros, "allreduce_bytes"), 0)
    row = {
        "title": text,
        "phase": "pretrain",
        "module": None,
        "cost": cost,
        "steps": 1,
        "epochs": 1.0,
        "total_flops": 1,
        "approximate_flops": None,
    }
    return tables.plan_table({"recipe": text, "target_depths": [[1]], "meta_depths": [[1]], "rows": [row]})


def sharding(text: str) -> Any:
    each = {"strategy": text, "world": 2, "samples": 1, "total": 1, "activations": 0, "sent": 1}
    return tables.sharding_tables(
        {"rows": [{"title": text, "unit": text, "batch_size": 1, "batch_units": 1, "sharding": [each]}]}
    )[0]


def cluster(text: str) -> Any:
    phases = [{"title": text, "gpus": 1, "seconds": 1.0}]
    return tables.cluster_table({"gpus": 1, "phases": phases, "seconds": 1.0, "gpu_seconds": 1.0})


TABLES = [status, status_of_slow_rank, checkpoints, comparison, summary, plan, sharding, cluster]


def printed(show: Callable[[Console], object], *, terminal: bool) -> str:
    out = io.StringIO()
    show(Console(file=out, width=1000, force_terminal=terminal, legacy_windows=False))
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: str(table.__name__))
def test_tables_print_text_as_it_is(table: Callable[[str], Any], text: str) -> None:
    for terminal in (False, True):
        assert text in printed(lambda console: console.print(table(text)), terminal=terminal)
    assert text in printed(
        lambda console: Live(table(text), console=console, transient=False).__enter__().stop(), terminal=True
    )


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_progress_prints_text_as_it_is(text: str, terminal: bool, tmp_path: Path) -> None:
    job: Any = Job.__new__(Job)
    for name, value in {"key": text, "title": text, "steps": 2, "unit": text, "metrics": [TOP1]}.items():
        object.__setattr__(job, name, value)

    def show(console: Console) -> None:
        with ProgressReporter(console) as reporter:
            reporter.started(job)
            reporter.say(f"say {text}")
            reporter.failed(job, 3, f"fail {text}", tmp_path / text)
            reporter.done(job, {"metrics": {"top1": 1.0}})

    found = printed(show, terminal=terminal)
    assert {f"say {text}", f"fail {text}"} <= {line.partition("): ")[2] or line for line in found.splitlines()}
    assert f"{text} failed (exit 3)" in found or f"{text}: failed (exit 3)" in found


@pytest.mark.parametrize("text", TEXTS)
def test_console_of_commands_prints_text_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    command_console().print(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_cell_is_one_line_without_control_characters() -> None:
    assert tables.plain_text("a\nb\x1b[31mc").plain == "a b [31mc"
