"""Decide how a Slurm job ends: done, requeued to resume from its checkpoint, or failed.

The decision is based on the files of the run directory, because the exit code of the ranks is unreliable: torch and
Slurm change it, and a killed rank has none.
"""

from __future__ import annotations

import os
import signal

from ...errors import Exit, ExternalError, format_count
from ...storage.checkpoint_verification import find_committed
from ...storage.run_directory import PhaseDir
from .client import query_job_state, requeue_job

DETERMINISTIC_FAILURES = (Exit.USAGE, Exit.ARTIFACT, Exit.NON_FINITE, Exit.DAMAGED)  # a requeue would fail again
MAX_REQUEUES_WITHOUT_PROGRESS = 3  # consecutive requeues
LIMITS = (("BIGINCUBATE_MAX_REQUEUES", "20"), ("SLURM_RESTART_COUNT", "0"))
SIGNAL_EXIT_OFFSET = 128  # shells and srun add this to the number of the signal that ended a rank


def handle_job_exit(folder: PhaseDir, job: str, code: int) -> tuple[int, str]:
    """Requeue a job that has ended early, if a requeue may succeed.

    Args:
        folder: The folder of the phase that the job ran.
        job: The job id, or ``ARRAY_INDEX`` for an array task, which is requeued without the other tasks.
        code: The exit code of srun.

    Returns:
        The exit code of the job, and the reason.

    Raises:
        OSError: A file of the phase cannot be read or written.
    """
    if folder.result is not None:
        return Exit.DONE, "done"
    reason = describe_exit_code(code)
    if code in DETERMINISTIC_FAILURES:
        return code, f"{reason}; deterministic failure: not requeued"
    failed = code or Exit.ENVIRONMENT
    try:
        state = query_job_state(job)
    except ExternalError as error:
        return failed, f"{reason}; not requeued: {error}"
    if state != "RUNNING":  # scancel, a crashed node or the time limit: Slurm or a user has ended the job
        return failed, f"{reason}; Slurm has ended this job: {state}"
    allowed, restarts = (int(os.environ.get(name, default)) for name, default in LIMITS)
    if restarts >= allowed:
        return failed, f"{reason}; not requeued: already requeued {format_count(restarts, 'time')} (slurm.max_requeues)"
    checkpoint = max(find_committed(folder.checkpoints), default=None)
    before = [row["checkpoint"] for row in folder.read_requeues() if row["job"] == job]
    last = before[-MAX_REQUEUES_WITHOUT_PROGRESS:]
    if len(before) >= MAX_REQUEUES_WITHOUT_PROGRESS and set(last) == {checkpoint}:
        return failed, f"{reason}; not requeued: no progress in {MAX_REQUEUES_WITHOUT_PROGRESS} requeues"
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    folder.log_requeue(job=job, code=code, checkpoint=checkpoint, reason=reason, nodes=nodes)
    try:
        requeue_job(job)
    except ExternalError as error:
        return failed, f"{reason}; not requeued: {error}"
    return failed, f"{reason}; requeued"


def describe_exit_code(code: int) -> str:
    """Return a description of an exit code of srun."""
    if code == Exit.PREEMPTED:
        return "stopped with a checkpoint"
    if code > SIGNAL_EXIT_OFFSET and code - SIGNAL_EXIT_OFFSET in {number.value for number in signal.Signals}:
        return f"a rank was ended by {signal.Signals(code - SIGNAL_EXIT_OFFSET).name}"
    return f"exit code {code}"
