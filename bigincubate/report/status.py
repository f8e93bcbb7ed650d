"""Read the status of a run from its files, and that of its jobs from Slurm's queue."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ArtifactError, Exit, ExternalError, format_command
from ..launchers.slurm.job_logs import count_gate_failures, read_job_trace
from ..launchers.slurm.submission_log import QueuedJob, list_queued_jobs
from ..storage.checkpoint_verification import find_committed
from ..storage.lease import process_start_time
from ..storage.run_directory import PhaseDir, RunDir, is_complete_export
from ..tasks.metric import planned_metrics

LOOPING = 3  # failures of a gate in a row
NO_STATUS = dict.fromkeys(
    (
        *("step", "steps", "percent", "loss", "headline", "unit", "samples_per_sec", "eta_seconds", "partial"),
        *("checkpoint", "error", "job", "queue", "node", "stragglers"),
    )
)


@dataclass
class QueueReader:
    """Reads the jobs of a run from Slurm's queue, at most every 30 seconds, and every 60 while nothing changes.

    Attributes:
        run: The run directory.
        clock: Returns the time in seconds.
        jobs: The last answer; None if nothing was submitted or Slurm did not respond.
        due: When to ask again.
    """

    run: RunDir
    clock: Callable[[], float] = time.monotonic
    jobs: list[QueuedJob] | None = None
    due: float = field(default=float("-inf"))

    def read(self) -> list[QueuedJob] | None:
        """Return the jobs in the queue, or None if nothing was submitted or Slurm did not respond."""
        if self.clock() < self.due:
            return self.jobs
        before, self.jobs = self.jobs, read_queue(self.run)
        self.due = self.clock() + (60 if self.jobs is None or self.jobs == before else 30)
        return self.jobs


def read_queue(run: RunDir) -> list[QueuedJob] | None:
    """Return the jobs in the queue, or None if nothing was submitted or they cannot be read."""
    if not (run.path / "jobs.json").exists():
        return None
    try:
        return list_queued_jobs(run)
    except (ExternalError, ArtifactError):
        return None


def run_status(
    run: RunDir, read_jobs: Callable[[RunDir], Sequence[QueuedJob] | None] = read_queue
) -> list[dict[str, Any]]:
    """Return the status of each phase. If Slurm does not respond, only files are used.

    Args:
        run: The run directory.
        read_jobs: Returns the jobs of the run in the queue, or None.

    Returns:
        A dict per phase: phase (its key), title, state (waiting, queued, held, running, preempted, failed, died, done),
        step, steps, percent, loss (training loss), metrics (of the validation split, by name), headline (the name of
        the main metric), unit, samples_per_sec, eta_seconds, attempts, restarts, checkpoint, error and node; partial
        for a module (:attr:`.PhaseDir.partial`); stragglers (:attr:`.PhaseDir.stragglers`, empty unless the phase is
        running); job and queue (Slurm's state, with the reason if it is pending) for a
        job in the queue. If the run is on Slurm and not done, the last dict is that of the gate, with state queued,
        held, running, looping (it fails again and again) or missing; what a gate does not have is None.

    Raises:
        ArtifactError: This is not a run directory, or it has no plan yet.
    """
    queued = read_jobs(run)
    jobs = None if queued is None else {entry.key: entry for entry in queued}
    rows = []
    for planned in read_plan(run)["rows"]:
        folder = run.phase(planned["phase"], planned["module"])
        if planned["phase"] == "end_to_end" and not folder.path.exists():
            continue  # the baseline was not requested
        rows.append({"phase": planned["key"], "title": planned["title"], **_phase_status(folder, planned)})
        rows[-1] |= _job_status(rows[-1], folder, jobs)
        rows[-1] |= _trace_status(rows[-1], run)
    if jobs is not None and not (all(row["state"] == "done" for row in rows) and is_complete_export(run.exported)):
        rows.append(_gate_status(run, jobs.get("gate")))
    return rows


def _gate_status(run: RunDir, entry: QueuedJob | None) -> dict[str, Any]:
    """Return the status of the gate of a run that is not done.

    Args:
        run: The run directory.
        entry: The gate in the queue.
    """
    failures, error = count_gate_failures(run), read_job_trace(run, "gate") or None
    row: dict[str, Any] = {
        **NO_STATUS,
        "phase": "gate",
        "title": "gate",
        "metrics": {},
        "attempts": 0,
        "restarts": failures,
    }
    if entry is None:
        hint = f"continue with: {format_command('resume', run.path)}"
        return row | {"state": "missing", "error": f"{error}; {hint}" if error else hint}
    state = "held" if entry.held else "looping" if failures >= LOOPING else "queued"
    if entry.state != "PENDING":
        state = "looping" if failures >= LOOPING else "running"
    return row | {"state": state, "error": error, **_queue_columns(entry)}


def _queue_columns(entry: QueuedJob) -> dict[str, Any]:
    """Return the columns of a job in the queue: its id, its state with the reason if it is pending, and its node."""
    queue = entry.state if entry.state == "RUNNING" else f"{entry.state} ({entry.reason})"
    columns = {"job": entry.job, "queue": queue, "node": entry.node or None}
    return columns | ({"error": f"held: scontrol release {entry.job}"} if entry.held else {})


def read_plan(run: RunDir) -> dict[str, Any]:
    """Return ``plan.json`` of a run.

    Raises:
        ArtifactError: This is not a run directory, it has no plan yet, or the plan is damaged.
    """
    file = run.path / "plan.json"
    plan = run.read_plan()
    if plan is None:
        run.load_recipe()
        if os.path.lexists(file):
            again = format_command("run", run.recipe_file, "--run-dir", run.path)
            raise ArtifactError(f"{file} is damaged; remove it, and this command writes it again: {again}")
        raise ArtifactError(f"nothing has run in {run.path} yet")
    return plan


def _phase_status(folder: PhaseDir, planned: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a phase's status that is read from its files."""
    attempts, result, metrics = folder.read_attempts(), folder.result, folder.read_last_metrics()
    state = _state(attempts[-1]) if attempts else "waiting"
    error = attempts[-1].get("error") if attempts and state == "failed" else None
    if result is not None:
        state = "done"
    elif state == "done":
        state, error = "failed", "its result (DONE) is missing or damaged"
    checkpoint = max(find_committed(folder.checkpoints), default=None)
    # a phase that was stopped may have a checkpoint of a later step than the last one that was logged
    step = result["steps"] if result else max(metrics.get("step", 0), checkpoint or 0)
    rate = metrics.get(f"perf/{planned['unit']}_per_sec")
    measured = planned_metrics(planned)
    logged = {metric.name: metrics[tag] for metric in measured if (tag := f"val/{metric.name}") in metrics}
    left = max(0, planned["steps"] - step) * planned["batch_units"]
    return {
        "state": state,
        "step": step,
        "steps": planned["steps"],
        "percent": 100.0 if result else min(100.0, 100 * step / max(1, planned["steps"])),
        "loss": metrics.get("train/loss"),
        "metrics": result["metrics"] if result else logged,
        "headline": measured[0].name,
        "unit": planned["unit"],
        "samples_per_sec": rate,
        "eta_seconds": left / rate if rate and state == "running" else None,
        "attempts": len(attempts),
        "partial": folder.partial,
        "checkpoint": checkpoint,
        "error": error,
        "stragglers": folder.stragglers if state == "running" else [],
    }


def _job_status(row: dict[str, Any], folder: PhaseDir, jobs: dict[str, QueuedJob] | None) -> dict[str, Any]:
    """Return the part of a phase's status that depends on the queue: queued, running, or died on another machine."""
    last: dict[str, Any] = next(iter(folder.read_attempts()[-1:]), {})
    status = {"job": None, "queue": None, "node": last.get("host"), "restarts": max(0, row["attempts"] - 1)}
    if row["state"] != "done" and (requeues := folder.read_requeues()):
        status["error"] = row["error"] or _describe_requeues(requeues)
    if jobs is None or row["state"] == "done":
        return status
    entry = jobs.get(row["phase"])
    if entry is None:
        lost = row["state"] == "running" and last.get("job")
        return status | ({"state": "died", "eta_seconds": None} if lost else {})
    status |= _queue_columns(entry)
    if entry.state in ("RUNNING", "COMPLETING"):
        return status
    return status | {"state": "held" if entry.held else "queued", "eta_seconds": None}


def _describe_requeues(requeues: Sequence[dict[str, Any]]) -> str:
    """Return why a job was last requeued, with its node if the ranks failed there twice in a row."""
    reason: str = requeues[-1]["reason"]
    failed = [row.get("nodes") for row in requeues[-2:] if row["code"] != Exit.PREEMPTED]
    if len(failed) == 2 and failed[0] and failed[0] == failed[1]:
        return f"{reason}, twice in a row on {failed[0]}"
    return reason


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
