"""The modules of the study of ways to train, which are no package, and what their tests have in common."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("definition", "lengths", "log", "page", "paired", "trial")


@contextmanager
def import_study() -> Iterator[Any]:
    """Import the modules of the study, with nothing left behind in `sys.path`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        modules = {name: importlib.import_module(f"ways_study.{name}") for name in MODULES}
        yield SimpleNamespace(program=importlib.import_module("ways"), **modules)


def load_own_study(parts: Any, folder: Path) -> Any:
    """Load a copy of the definition for digits in a repository of its own, with one point per way."""
    text = (BENCHMARKS / "ways_study" / "digits.toml").read_text().replace("points = 12", "points = 1")
    (folder / "digits.toml").write_text(text.replace('"../', f'"{BENCHMARKS}/'))
    _git(folder, "init", "-q")
    commit(folder)
    return parts.definition.load_study(str(folder / "digits.toml"))


def _git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    subprocess.run(["git", *identity, *words], cwd=folder, check=True)


def commit(folder: Path) -> None:
    """Commit all files of a repository."""
    _git(folder, "add", ".")
    _git(folder, "commit", "-q", "-m", "Add files")


# costs of a finished trial as the log has them; its FLOPs depend on the trial
COSTS: dict[str, Any] = {"flops": 1, "path_flops": 1, "connected_path_flops": None, "seconds": 1.0}
COSTS |= dict.fromkeys(("memory_before", "memory_last", "sent_before", "sent_last"), 0)


def make_entry(trial: Any, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    """Return a line of the log."""
    return {
        **{"split": trial.split, "way": trial.way.name, "budget": trial.budget, "seed": trial.seed},
        **{"index": trial.index, "sets_digest": trial.digest, "metrics": {"loss": loss}},
        **{"version": "1", "settings_digest": "a", **COSTS, "flops": trial.plan.flops, **more},
    }


def costs_of(parts: Any, counted: Any, study: Any) -> Any:
    """Return the costs of a study, which share what has been counted for another one."""
    other = parts.lengths.Costs(study)
    other._counted = counted._counted
    return other
