"""Where a run stands: read from its files, and for jobs from Slurm's queue."""

from __future__ import annotations

import socket
from typing import Any

from ..checkpoint.lock import start_time
from ..errors import ArtifactError, EnvironmentFault
from ..files import read_json, read_lines
from ..rundir import PhaseDir, RunDir
from ..storage.metrics_log import last_metrics
from .slurm import Queued, queue


def run_status(run: RunDir) -> list[dict[str, Any]]:
    """A row a phase: title, state (waiting, queued, running, preempted, failed, died, done), step, steps, percent,
    loss, top1, images_per_sec, eta_seconds, attempts, restarts, checkpoint, error, node; of a module partial
    (:attr:`.PhaseDir.partial`); of a job in the queue: job, queue (its state, with the reason for which it waits).
    Where Slurm does not answer, files alone are asked.

    Raises:
        ArtifactError: not a run directory, or nothing has been planned in it yet.
    """
    plan = read_json(run.path / "plan.json")
    if plan is None or "rows" not in plan:
        run.recipe()
        raise ArtifactError(f"nothing has run in {run.path} yet")
    jobs = _jobs(run)
    rows = []
    for planned in plan["rows"]:
        folder = run.phase(planned["phase"], planned["module"])
        if planned["phase"] == "end_to_end" and not folder.path.exists():
            continue  # a baseline nobody asked for
        rows.append({"phase": planned["key"], "title": planned["title"], **_phase_status(folder, planned)})
        rows[-1] |= _job_status(rows[-1], folder, jobs)
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
        "partial": folder.partial,
        "checkpoint": checkpoints[-1] if checkpoints else None,
        "error": attempts[-1].get("error") if attempts and state == "failed" else None,
    }


def _jobs(run: RunDir) -> dict[str, Queued] | None:
    """What is in the queue, by phase. None where nothing was submitted, or Slurm does not answer."""
    if not (run.path / "jobs.json").exists():
        return None
    try:
        return {entry.key: entry for entry in queue(run)}
    except EnvironmentFault:
        return None


def _job_status(row: dict[str, Any], folder: PhaseDir, jobs: dict[str, Queued] | None) -> dict[str, Any]:
    """What the queue knows better than the files: whether a phase waits, runs, or has died on another machine."""
    last: dict[str, Any] = next(iter(folder.attempts()[-1:]), {})
    told = {"job": None, "queue": None, "node": last.get("host"), "restarts": max(0, row["attempts"] - 1)}
    if row["state"] != "done" and (requeues := read_lines(folder.path / "requeues.jsonl")):
        told["error"] = row["error"] or requeues[-1]["reason"]
    if jobs is None or row["state"] == "done":
        return told
    entry = jobs.get(row["phase"])
    if entry is None:
        lost = row["state"] == "running" and last.get("job")
        return told | ({"state": "died", "eta_seconds": None} if lost else {})
    told |= {"job": entry.job, "queue": entry.state, "node": entry.node or None}
    if entry.state == "RUNNING":
        return told
    return told | {"state": "queued", "eta_seconds": None, "queue": f"{entry.state} ({entry.reason})"}


def _state(attempt: dict[str, Any]) -> str:
    state: str = attempt["state"]
    here = attempt["host"] == socket.gethostname()
    if state == "running" and here and start_time(attempt["pid"]) is None:
        return "died"
    return state
