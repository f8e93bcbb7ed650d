"""Slurm's own programs: what is in the queue of a run, and taking it out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import EnvironmentFault
from ..rundir import RunDir

NAME = "bigincubate-"
DEFAULT_ARRAY = 1001  # Slurm's MaxArraySize where the administrator sets none
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("REVOKED", "TIMEOUT"),
}


@dataclass(frozen=True)
class Queued:
    """A job or an array task of this run that has not ended."""

    job: str  # of an array: the array's
    kind: str
    module: int | None
    state: str
    node: str
    reason: str

    @property
    def key(self) -> str:
        return self.kind if self.module is None else f"{self.kind}/{self.module}"


def call(*words: str, env: Mapping[str, str] | None = None) -> str:
    """What one of Slurm's programs prints.

    Raises:
        EnvironmentFault: it is not there, it fails, or it does not answer.
    """
    if shutil.which(words[0]) is None:
        raise EnvironmentFault(f"{words[0]} is not there: this needs Slurm; without it, use `bigincubate run`")
    try:
        ended = subprocess.run(words, capture_output=True, text=True, env=env, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(f"{words[0]} does not answer; try again later") from None
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        raise EnvironmentFault(f"{words[0]} failed: {said[-1] if said else ended.returncode}")
    return ended.stdout.strip()


def comment(run: RunDir) -> str:
    """What the jobs of a run carry, whoever submitted them."""
    return str(run.path.resolve())


def job_name(kind: str, offset: int = 0) -> str:
    """``bigincubate-incubate+1000``: index 7 of this array is module 1007."""
    return f"{NAME}{kind}" + (f"+{offset}" if offset else "")


def queue(run: RunDir) -> list[Queued]:
    """What of this run is in the queue; known by its name and by the run directory in its comment.

    Raises:
        EnvironmentFault: Slurm does not answer.
    """
    found = []
    for line in call("squeue", "--noheader", "--array", "--format=%F|%K|%T|%j|%N|%r|%k").splitlines():
        fields = line.split("|", 6)
        if len(fields) < 7:
            continue  # somebody else's, whose comment has several lines
        job, index, state, name, node, reason, whose = fields
        if whose == comment(run) and name.startswith(NAME) and state not in ENDED:
            kind, _, offset = name.removeprefix(NAME).partition("+")
            module = int(offset or 0) + int(index) if kind == "incubate" else None
            found.append(Queued(job, kind, module, state, node, reason))
    return found


def job_state(job: str) -> str:
    """RUNNING, COMPLETING, PENDING, … of one job or array task (``12_3``).

    Raises:
        EnvironmentFault: Slurm does not answer, or has forgotten it.
    """
    return call("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job)


def requeue(job: str) -> None:
    """
    Raises:
        EnvironmentFault: Slurm refuses.
    """
    call("scontrol", "requeue", job)


def array_size() -> int:
    """How many indices an array may have, from 0 on: the administrator's MaxArraySize.

    Raises:
        EnvironmentFault: Slurm does not answer.
    """
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else DEFAULT_ARRAY


def job_logs(run: RunDir, module: int | None = None) -> list[Path]:
    """Logs of jobs and of their ranks, of all or of one module's."""
    files = sorted((run.path / "slurm").glob(f"{NAME}*.out"))
    return [file for file in files if module is None or _module(file) == module]


def _module(log: Path) -> int | None:
    """``bigincubate-incubate+1000_12_7.0.out`` is about module 1007."""
    found = re.fullmatch(rf"{job_name('incubate')}(?:\+(\d+))?_\d+_(\d+)(?:\.\d+)?\.out", log.name)
    return int(found[1] or 0) + int(found[2]) if found else None


def cancel(run: RunDir) -> list[str]:
    """Take everything of this run out of the queue, gates first; what runs is told, and writes a checkpoint. Gives the
    ids.

    Raises:
        EnvironmentFault: Slurm does not answer.
    """
    ids = list(dict.fromkeys(entry.job for entry in sorted(queue(run), key=lambda entry: entry.kind != "gate")))
    if ids:
        call("scancel", *ids)
        run.note("cancelled", jobs=ids)
    return ids


def clean_environment() -> dict[str, str]:
    """This process's environment without what belongs to the job that it may itself be in."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
