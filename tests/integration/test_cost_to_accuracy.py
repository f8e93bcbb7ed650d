"""`benchmarks/cost_to_accuracy.py` as a program: what it prints when a run fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "cost_to_accuracy.py"


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, str(PROGRAM), "digits", "--budgets", "1", "--jobs", "1", "--out", str(folder), *words]
    return subprocess.run(given, cwd=folder, capture_output=True, text=True)


def test_run_that_fails_ends_the_comparison_with_its_code(tmp_path: Path) -> None:
    done = _run(tmp_path, "--ways", "expanded", "end-to-end", "--set", "model.name=vit_nonexistent")
    first, last = done.stderr.splitlines()
    assert "vit_nonexistent" in first
    assert last == f"error: {tmp_path / 'expanded-1-0'}: exit code {done.returncode}; its error is above"
    assert done.returncode == 2


def test_wrong_setting_is_one_line(tmp_path: Path) -> None:
    done = _run(tmp_path, "--set", "train.batch=1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
