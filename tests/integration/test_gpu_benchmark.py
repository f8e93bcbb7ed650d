"""The tests and benchmarks for GPUs, at toy size on the CPU. A benchmark measures each row once and keeps it."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's module, with nothing left behind in `sys.path`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.fixture
def run(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the benchmark in this process, rows too; return what it printed."""

    def measure_here(row: Any, args: Any, limit: float) -> dict[str, Any]:
        lines = row.measure(gpu.Request(gpu.Sizes(toy=True, steps=1, repeats=2), args.out))
        return {"row": row.name, "table": row.table, "seconds": 0.0, "device": "CPU", "torch": "2", "lines": lines}

    def run(*words: object) -> str:
        monkeypatch.setattr(gpu, "measure_row", measure_here)
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words), "--device", "cpu", "--toy"])
        gpu.main()
        return capsys.readouterr().out

    return run


def test_rows_are_measured_once_and_written_as_tables(run: Callable[..., str], tmp_path: Path) -> None:
    names = ["kernel-add-branch", "kernel-fused-loss", "checkpoint"]
    assert "kernel-add-branch: " in run("--out", tmp_path, "--only", *names)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == names
    assert [len(row["lines"]) for row in rows] == [4, 2, 2]
    assert all(line["times as fast"] > 0 for row in rows[:2] for line in row["lines"])
    assert all(line["ms until committed"] >= line["ms training waits"] for line in rows[2]["lines"])
    page = (tmp_path / "gpu.md").read_text()
    assert "## Kernels" in page
    assert "## Checkpoints" in page
    assert "kernel-add-branch" not in run("--out", tmp_path, "--only", *names)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


def test_no_row_is_started_when_the_time_is_over(run: Callable[..., str], tmp_path: Path) -> None:
    assert "resume with incubation-b-0" in run("--out", tmp_path, "--minutes", "0")
    assert not (tmp_path / "rows.jsonl").exists()


def test_failed_row_is_named_on_the_page(gpu: Any) -> None:
    page = gpu.markdown([{"row": "data-wait", "table": "Waiting for data", "seconds": 1.0, "error": "exit 1: no"}])
    assert page == "Not measured yet.\n\n## Failed\n\n- `data-wait`: exit 1: no\n"


def test_every_row_names_a_function(gpu: Any) -> None:
    assert len({row.name for row in gpu.ROWS}) == len(gpu.ROWS)
    for row in gpu.ROWS:
        assert callable(getattr(importlib.import_module(f"gpu_rows.{row.module}"), row.function))


def test_step_of_a_module_is_measured_in_a_process(gpu: Any, tmp_path: Path) -> None:
    """The path of every row of training steps: a process for the row, and one for each contestant."""
    row = next(row for row in gpu.ROWS if row.name == "incubation-b-0")
    asked = gpu.argparse.Namespace(out=tmp_path, reference=None, toy=True, device="cpu")
    found = gpu.measure_row(row, asked, 600)
    assert "error" not in found, found
    assert [line["contestant"] for line in found["lines"]] == ["plain", "skipping"]
    assert all(line["images/s"] > 0 for line in found["lines"])
    assert {line.get("as") for line in found["lines"]} == {"skipping", None}


def test_tests_for_gpus_pass_on_the_cpu(tmp_path: Path) -> None:
    """At toy size, without those that compile blocks, which take minutes."""
    words = ["-m", "pytest", str(REPOSITORY / "tests" / "gpu"), "--device", "cpu", "-k", "not compiled", "-rN"]
    words += ["--basetemp", str(tmp_path / "gpu"), "-p", "no:cacheprovider"]
    ended = subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-5000:]
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed is not None, ended.stdout
    assert int(passed[1]) >= 40  # those of Triton's kernels are skipped
