"""How a Slurm job ends: done, requeued to go on from its checkpoint, or failed for good.

The ranks' exit code says little (torch and Slurm change it, a killed rank has none): the run directory tells.
"""

from __future__ import annotations

import os
import subprocess

from ..errors import Exit
from ..files import append_line, read_lines
from ..rundir import PhaseDir

FINAL = (Exit.USAGE, Exit.ARTIFACT, Exit.NON_FINITE, Exit.DAMAGED)  # the same again would end the same
STANDSTILL = 3  # requeues in a row from one and the same checkpoint


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
        return code, "failed; the same again would end the same"
    allowed, restarts = (
        int(os.environ.get("BIGINCUBATE_RESTARTS", "20")),
        int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )
    if restarts >= allowed:
        return code or Exit.ENVIRONMENT, f"not requeued: it was {restarts} times already (slurm.restarts)"
    steps = sorted(int(marker.parent.name[5:]) for marker in folder.checkpoints.glob("step-*/COMMITTED"))
    file = folder.path / "requeues.jsonl"
    append_line(file, {"job": job, "code": code, "checkpoint": steps[-1] if steps else None})
    last = read_lines(file)[-STANDSTILL - 1 :]
    if len(last) > STANDSTILL and len({row["checkpoint"] for row in last}) == 1:
        return code or Exit.ENVIRONMENT, f"not requeued: no progress in {STANDSTILL} restarts"
    subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    return code or Exit.PREEMPTED, "requeued"
