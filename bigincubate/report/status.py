"""Read the status of a run from its files, and that of its jobs from Slurm's queue."""

from __future__ import annotations

import socket
from typing import Any

from ..errors import ArtifactError, ExternalError
from ..files import read_json, read_json_lines
from ..launchers.slurm.client import QueuedJob, list_queued_jobs, read_job_trace
from ..storage.lease import process_start_time
from ..storage.metrics_log import read_last_metrics
from ..storage.run_directory import PhaseDir, RunDir
from ..tasks.metric import planned_metrics


def run_status(run: RunDir) -> list[dict[str, Any]]:
    """Return the status of each phase. If Slurm does not respond, only files are used.

    Returns:
        A dict per phase: phase (its key), title, state (waiting, queued, running, preempted, failed, died, done), step,
        steps, percent, loss (training loss), metrics (of the validation split, by name), headline (the name of the main
        metric), unit, samples_per_sec, eta_seconds, attempts, restarts, checkpoint, error and node; partial for a
        module (:attr:`.PhaseDir.partial`); job and queue (Slurm's state, with the reason if it is pending) for a job in
        the queue.

    Raises:
        ArtifactError: This is not a run directory, or it has no plan yet.
    """
    jobs = _jobs(run)
    rows = []
    for planned in read_plan(run)["rows"]:
        folder = run.phase(planned["phase"], planned["module"])
        if planned["phase"] == "end_to_end" and not folder.path.exists():
            continue  # the baseline was not requested
        rows.append({"phase": planned["key"], "title": planned["title"], **_phase_status(folder, planned)})
        rows[-1] |= _job_status(rows[-1], folder, jobs)
        rows[-1] |= _trace_status(rows[-1], run)
    return rows


def read_plan(run: RunDir) -> dict[str, Any]:
    """Return ``plan.json`` of a run.

    Raises:
        ArtifactError: This is not a run directory, or it has no plan yet.
    """
    plan = read_json(run.path / "plan.json")
    if plan is None or "rows" not in plan:
        run.load_recipe()
        raise ArtifactError(f"nothing has run in {run.path} yet")
    return plan


def _phase_status(folder: PhaseDir, planned: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a phase's status that is read from its files."""
    attempts, result, metrics = folder.read_attempts(), folder.result, read_last_metrics(folder)
    state = _state(attempts[-1]) if attempts else "waiting"
    if result is not None:
        state = "done"
    checkpoints = (int(path.parent.name[5:]) for path in folder.checkpoints.glob("step-*/COMMITTED"))
    checkpoint = max(checkpoints, default=None)
    # a phase that was stopped may have a checkpoint of a later step than the last one that was logged
    step = result["steps"] if result else max(metrics.get("step", 0), checkpoint or 0)
    rate = metrics.get(f"perf/{planned['unit']}_per_sec")
    measured = planned_metrics(planned)
    logged = {metric.name: metrics[tag] for metric in measured if (tag := f"val/{metric.name}") in metrics}
    left = (planned["steps"] - step) * planned["batch_size"]
    return {
        "state": state,
        "step": step,
        "steps": planned["steps"],
        "percent": 100.0 if result else 100 * step / max(1, planned["steps"]),
        "loss": metrics.get("train/loss"),
        "metrics": result["metrics"] if result else logged,
        "headline": measured[0].name,
        "unit": planned["unit"],
        "samples_per_sec": rate,
        "eta_seconds": left / rate if rate and state == "running" else None,
        "attempts": len(attempts),
        "partial": folder.partial,
        "checkpoint": checkpoint,
        "error": attempts[-1].get("error") if attempts and state == "failed" else None,
    }


def _jobs(run: RunDir) -> dict[str, QueuedJob] | None:
    """Return the jobs in the queue by phase, or None if nothing was submitted or Slurm does not respond."""
    if not (run.path / "jobs.json").exists():
        return None
    try:
        return {entry.key: entry for entry in list_queued_jobs(run)}
    except ExternalError:
        return None


def _job_status(row: dict[str, Any], folder: PhaseDir, jobs: dict[str, QueuedJob] | None) -> dict[str, Any]:
    """Return the part of a phase's status that depends on the queue: queued, running, or died on another machine."""
    last: dict[str, Any] = next(iter(folder.read_attempts()[-1:]), {})
    status = {"job": None, "queue": None, "node": last.get("host"), "restarts": max(0, row["attempts"] - 1)}
    if row["state"] != "done" and (requeues := read_json_lines(folder.path / "requeues.jsonl")):
        status["error"] = row["error"] or requeues[-1]["reason"]
    if jobs is None or row["state"] == "done":
        return status
    entry = jobs.get(row["phase"])
    if entry is None:
        lost = row["state"] == "running" and last.get("job")
        return status | ({"state": "died", "eta_seconds": None} if lost else {})
    status |= {"job": entry.job, "queue": entry.state, "node": entry.node or None}
    if entry.state == "RUNNING":
        return status
    return status | {"state": "queued", "eta_seconds": None, "queue": f"{entry.state} ({entry.reason})"}


def _trace_status(row: dict[str, Any], run: RunDir) -> dict[str, Any]:
    """Return the part of a phase's status that a job has left behind that ended before it could start bigincubate.

    A gate that cannot start is an error of the phases that it would submit.
    """
    if row["state"] in ("done", "running") or row["error"]:
        return {}
    if text := read_job_trace(run, row["phase"]):
        return {"error": text} | ({"state": "failed"} if row["state"] == "waiting" else {})
    gate = read_job_trace(run, "gate") if row["state"] == "waiting" else ""
    return {"error": f"gate: {gate}"} if gate else {}


def _state(attempt: dict[str, Any]) -> str:
    """Return the state of an attempt; ``died`` if its process on this machine no longer exists."""
    state: str = attempt["state"]
    here = attempt["host"] == socket.gethostname()
    if state == "running" and here and process_start_time(attempt["pid"]) is None:
        return "died"
    return state
