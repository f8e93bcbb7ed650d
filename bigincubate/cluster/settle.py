"""How a Slurm job ends: done, requeued to go on from its checkpoint, or failed for good.

The ranks' exit code says little (torch and Slurm change it, a killed rank has none): the run directory tells.
"""

from __future__ import annotations

import os
import signal
import time

from ..errors import EnvironmentFault, Exit
from ..files import append_line, read_lines
from ..rundir import PhaseDir
from .slurm import job_state, requeue

FINAL = (Exit.USAGE, Exit.ARTIFACT, Exit.NON_FINITE, Exit.DAMAGED)  # the same again would end the same
STANDSTILL = 3  # requeues in a row from one and the same checkpoint
LIMITS = (("BIGINCUBATE_RESTARTS", "20"), ("SLURM_RESTART_COUNT", "0"))
KILLED = 128  # added by shells and srun to the number of the signal that ended a rank


def settle(folder: PhaseDir, job: str, code: int) -> tuple[int, str]:
    """Requeue ``job`` (of an array, this task alone: ``ARRAY_INDEX``) where that can help.

    Args:
        code: what srun ended with.

    Returns:
        The exit code of the job, and why.
    """
    if folder.result is not None:
        return Exit.DONE, "done"
    if code in FINAL:
        return code, f"{ended_with(code)}; the same again would end the same"
    failed = code or Exit.ENVIRONMENT
    try:
        state = job_state(job)
    except EnvironmentFault as error:
        return failed, f"{ended_with(code)}; not requeued: {error}"
    if state != "RUNNING":  # scancel, a crashed node, the time limit: who did that has decided what comes next
        return failed, f"{ended_with(code)}; Slurm has ended this job: {state}"
    allowed, restarts = (int(os.environ.get(name, default)) for name, default in LIMITS)
    if restarts >= allowed:
        return failed, f"{ended_with(code)}; not requeued: it was {restarts} times already (slurm.restarts)"
    steps = sorted(int(marker.parent.name[5:]) for marker in folder.checkpoints.glob("step-*/COMMITTED"))
    file, checkpoint = folder.path / "requeues.jsonl", steps[-1] if steps else None
    before = [row["checkpoint"] for row in read_lines(file) if row["job"] == job]
    if len(before) >= STANDSTILL and set(before[-STANDSTILL:]) == {checkpoint}:
        return failed, f"{ended_with(code)}; not requeued: no progress in {STANDSTILL} restarts"
    reason = ended_with(code)
    append_line(file, {"time": time.time(), "job": job, "code": code, "checkpoint": checkpoint, "reason": reason})
    try:
        requeue(job)
    except EnvironmentFault as error:
        return failed, f"{reason}; not requeued: {error}"
    return failed, f"{reason}; requeued"


def ended_with(code: int) -> str:
    """What an exit code of srun says."""
    if code == Exit.PREEMPTED:
        return "stopped with a checkpoint"
    if code > KILLED and code - KILLED in {number.value for number in signal.Signals}:
        return f"a rank was ended by {signal.Signals(code - KILLED).name}"
    return f"exit code {code}"
