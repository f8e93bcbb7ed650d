"""Client for Slurm's command-line programs: list, requeue and cancel the jobs of a run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import EnvironmentFault
from ...storage.run_directory import RunDir

JOB_NAME_PREFIX = "bigincubate-"
DEFAULT_ARRAY = 1001  # Slurm's default for MaxArraySize
ENDED_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("REVOKED", "TIMEOUT"),
}


@dataclass(frozen=True)
class Queued:
    """A job or an array task of a run that has not ended.

    Attributes:
        job: The job id; for an array task the id of the array.
        kind: ``pretrain``, ``incubate``, ``finetune``, ``end_to_end`` or ``gate``.
        module: Index of the module, for ``incubate`` only.
        state: Slurm's state, such as ``RUNNING`` or ``PENDING``.
        node: Names of the nodes it runs on; empty while it is pending.
        reason: Slurm's reason why it is pending.
    """

    job: str
    kind: str
    module: int | None
    state: str
    node: str
    reason: str

    @property
    def key(self) -> str:
        """Return the key of the phase that the job runs, such as ``incubate/3``."""
        return self.kind if self.module is None else f"{self.kind}/{self.module}"


def call(*words: str, env: Mapping[str, str] | None = None) -> str:
    """Run one of Slurm's programs and return what it printed.

    Args:
        words: The program and its arguments.
        env: The environment of the program; None for that of this process.

    Raises:
        EnvironmentFault: If the program is missing, fails, or does not answer within two minutes.
    """
    if shutil.which(words[0]) is None:
        raise EnvironmentFault(f"{words[0]} not found: this command needs Slurm; without Slurm use `bigincubate run`")
    try:
        ended = subprocess.run(words, capture_output=True, text=True, env=env, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(f"{words[0]} does not answer; try again later") from None
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        raise EnvironmentFault(f"{words[0]} failed: {lines[-1] if lines else ended.returncode}")
    return ended.stdout.strip()


def comment(run: RunDir) -> str:
    """Return the comment by which all jobs of a run are recognized, whichever user submitted them."""
    return str(run.path.resolve())


def job_name(kind: str, offset: int = 0) -> str:
    """Return the name of a job. In ``bigincubate-incubate+1000``, index 7 of the array is module 1007."""
    return f"{JOB_NAME_PREFIX}{kind}" + (f"+{offset}" if offset else "")


def queue(run: RunDir) -> list[Queued]:
    """Return the jobs of a run that are in the queue, recognized by their name and comment.

    Raises:
        EnvironmentFault: If Slurm does not answer.
    """
    found = []
    for line in call("squeue", "--noheader", "--array", "--format=%F|%K|%T|%j|%N|%r|%k").splitlines():
        fields = line.split("|", 6)
        if len(fields) < 7:
            continue  # part of a comment of several lines, of another user's job
        job, index, state, name, node, reason, job_comment = fields
        if job_comment == comment(run) and name.startswith(JOB_NAME_PREFIX) and state not in ENDED_STATES:
            kind, _, offset = name.removeprefix(JOB_NAME_PREFIX).partition("+")
            module = int(offset or 0) + int(index) if kind == "incubate" else None
            found.append(Queued(job, kind, module, state, node, reason))
    return found


def job_state(job: str) -> str:
    """Return Slurm's state of a job or an array task (``12_3``), such as ``RUNNING`` or ``COMPLETING``.

    Raises:
        EnvironmentFault: If Slurm does not answer or no longer knows the job.
    """
    return call("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job)


def requeue(job: str) -> None:
    """Requeue a job or an array task.

    Raises:
        EnvironmentFault: If Slurm refuses.
    """
    call("scontrol", "requeue", job)


def array_size() -> int:
    """Return Slurm's MaxArraySize: the indices of an array are below it.

    Raises:
        EnvironmentFault: If Slurm does not answer.
    """
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else DEFAULT_ARRAY


def job_logs(run: RunDir, module: int | None = None) -> list[Path]:
    """Return the logs of jobs and of their ranks, of the whole run or of one module."""
    files = sorted((run.path / "slurm").glob(f"{JOB_NAME_PREFIX}*.out"))
    return [file for file in files if module is None or _module_of_log(file) == module]


def _module_of_log(log: Path) -> int | None:
    """Return the module of a log: ``bigincubate-incubate+1000_12_7.0.out`` belongs to module 1007."""
    found = re.fullmatch(rf"{job_name('incubate')}(?:\+(\d+))?_\d+_(\d+)(?:\.\d+)?\.out", log.name)
    return int(found[1] or 0) + int(found[2]) if found else None


def cancel(run: RunDir) -> list[str]:
    """Cancel all jobs of a run and return their ids. Running jobs write a checkpoint first.

    Raises:
        EnvironmentFault: If Slurm does not answer.
    """
    # gates first, so that none submits new jobs in the meantime
    ids = list(dict.fromkeys(entry.job for entry in sorted(queue(run), key=lambda entry: entry.kind != "gate")))
    if ids:
        call("scancel", *ids)
        run.note("cancelled", jobs=ids)
    return ids


def clean_environment() -> dict[str, str]:
    """Return the environment without the variables of the Slurm job that this process may be part of."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
