"""Write run directories with logged metrics, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from records import make_plan, make_result

from bigincubate.config import load_recipe
from bigincubate.files import append_json_line, write_json
from bigincubate.storage.run_directory import PhaseDir, RunDir

KEYS = ("pretrain", "incubate/0", "incubate/1", "finetune")


def make_run(folder: Path, *sets: str) -> RunDir:
    """Return a run of two modules that has a plan and no metrics."""
    run, recipe = RunDir(folder), load_recipe("digits", sets)
    run.create(recipe)
    plan = make_plan(*KEYS)
    for row in plan["rows"]:
        row["identity"] = {"phase": row["key"], "train.lr": recipe.settings(row["phase"]).train.lr}
    write_json(run.path / "plan.json", {"recipe": recipe.name, **plan})
    return run


def phase_of(run: RunDir, key: str) -> PhaseDir:
    phase, _, module = key.partition("/")
    return run.phase(phase, int(module) if module else None)  # type: ignore[arg-type]


def log(run: RunDir, key: str, *steps: int, loss: float = 1.0) -> None:
    """Log steps. The last one has an additional metric."""
    for step in steps:
        more = {"val/top1": 50.0 + step} if step == steps[-1] else {}
        values = {"train/loss": loss / step, "perf/images_per_sec": 1000.0 + step, **more}
        append_json_line(phase_of(run, key).metrics, {"step": step, **values})


def finish(run: RunDir, key: str, steps: int = 8) -> None:
    metrics = {"top1": 91.5, "loss": 0.25}
    phase_of(run, key).write_result(make_result(metrics=metrics, steps=steps, seconds=3.5))


def finished_run(folder: Path) -> RunDir:
    """Return a run whose phases are finished after 8 steps, of which 4 are logged."""
    run = make_run(folder)
    for key in KEYS:
        log(run, key, 2, 4, 6, 8)
        finish(run, key)
    return run


def logged(run: RunDir, key: str) -> dict[int, dict[str, float]]:
    """Return the logged metrics by step."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in phase_of(run, key).metrics.read_text().splitlines()]
    return {row.pop("step"): row for row in rows}
