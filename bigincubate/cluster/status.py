"""Where a run stands, read from its files alone."""

from __future__ import annotations

import socket
from typing import Any

from ..checkpoint.lock import start_time
from ..errors import ArtifactError
from ..files import read_json
from ..rundir import PhaseDir, RunDir
from .progress import last_metrics


def run_status(run: RunDir) -> list[dict[str, Any]]:
    """A row a phase: title, state (waiting, running, preempted, failed, died, done), step, steps, percent, loss, top1,
    images_per_sec, eta_seconds, attempts, checkpoint, error.

    Raises:
        ArtifactError: not a run directory, or nothing has been planned in it yet.
    """
    plan = read_json(run.path / "plan.json")
    if plan is None or "rows" not in plan:
        run.recipe()
        raise ArtifactError(f"nothing has run in {run.path} yet")
    rows = []
    for planned in plan["rows"]:
        folder = run.phase(planned["phase"], planned["module"])
        if planned["phase"] == "end_to_end" and not folder.path.exists():
            continue  # a baseline nobody asked for
        rows.append({"phase": planned["key"], "title": planned["title"], **_phase_status(folder, planned)})
    return rows


def _phase_status(folder: PhaseDir, planned: dict[str, Any]) -> dict[str, Any]:
    attempts, result, metrics = folder.attempts(), folder.result, last_metrics(folder)
    state = _state(attempts[-1]) if attempts else "waiting"
    if result is not None:
        state = "done"
    step = result["steps"] if result else metrics.get("step", 0)
    rate = metrics.get("perf/images_per_sec")
    left = (planned["steps"] - step) * planned["batch_size"]
    checkpoints = sorted(int(path.parent.name[5:]) for path in folder.checkpoints.glob("step-*/COMMITTED"))
    return {
        "state": state,
        "step": step,
        "steps": planned["steps"],
        "percent": 100.0 if result else 100 * step / max(1, planned["steps"]),
        "loss": metrics.get("train/loss"),
        "top1": result["top1"] if result else metrics.get("val/top1"),
        "images_per_sec": rate,
        "eta_seconds": left / rate if rate and state == "running" else None,
        "attempts": len(attempts),
        "checkpoint": checkpoints[-1] if checkpoints else None,
        "error": attempts[-1].get("error") if attempts and state == "failed" else None,
    }


def _state(attempt: dict[str, Any]) -> str:
    state: str = attempt["state"]
    here = attempt["host"] == socket.gethostname()
    if state == "running" and here and start_time(attempt["pid"]) is None:
        return "died"
    return state
