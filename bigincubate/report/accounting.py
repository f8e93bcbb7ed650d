"""What the jobs of a run used, according to Slurm's accounting: node hours, CPU efficiency, memory, energy.

Not every cluster records this, and only of jobs that have begun; without it a report has no such section.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..errors import ArtifactError, ExternalError
from ..launchers.slurm.client import run_slurm_command
from ..launchers.slurm.submission_log import SubmissionLog
from ..storage.run_directory import RunDir

# the name is last because it may contain the separator
FIELDS = ("JobID", "State", "ElapsedRaw", "AllocNodes", "TotalCPU", "CPUTimeRAW", "MaxRSS", "ConsumedEnergyRaw")
FORMAT = ",".join((*FIELDS, "JobName"))
ANSWER_SECONDS = 30.0
SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


@dataclass
class JobAttempt:
    """One start of a job or of an array task; a requeued job has several.

    Attributes:
        key: Key of the phase, such as ``incubate/3``, or ``gate``.
        ended: Whether it has ended; Slurm counts CPU seconds only then.
        node_seconds: Elapsed time multiplied by the number of allocated nodes.
        cpu_seconds: CPU time that its processes used.
        allocated_cpu_seconds: Elapsed time multiplied by the number of allocated CPUs.
        memory: Largest memory of a task (a rank) in bytes; 0 if it was not measured.
        energy: Energy in joules; 0 if it was not measured.
    """

    key: str
    ended: bool
    node_seconds: float
    cpu_seconds: float
    allocated_cpu_seconds: float
    memory: float = 0.0
    energy: float = 0.0


@dataclass(frozen=True)
class JobUsage:
    """What several attempts used together.

    Attributes:
        attempts: The attempts.
    """

    attempts: Sequence[JobAttempt]

    @property
    def node_hours(self) -> float:
        """Return the time of allocated nodes in hours."""
        return sum(each.node_seconds for each in self.attempts) / 3600

    @property
    def cpu_efficiency(self) -> float | None:
        """Return the used share of the allocated CPU time, of the attempts that have ended; None if there is none."""
        ended = [each for each in self.attempts if each.ended]
        allocated = sum(each.allocated_cpu_seconds for each in ended)
        return sum(each.cpu_seconds for each in ended) / allocated if allocated else None

    @property
    def memory(self) -> float:
        """Return the largest memory of a task in bytes; 0 if it was not measured."""
        return max((each.memory for each in self.attempts), default=0.0)

    @property
    def energy(self) -> float:
        """Return the energy in joules; 0 if it was not measured."""
        return sum(each.energy for each in self.attempts)


def query_usage(run: RunDir) -> dict[str, JobUsage]:
    """Ask ``sacct`` what the jobs of a run used.

    Returns:
        The usage by the key of the phase; empty if nothing was submitted, if this is unknown because the log of
        submissions is damaged, or if Slurm keeps no accounting records or does not answer.
    """
    clusters: dict[str | None, dict[str, str]] = {}
    with suppress(ArtifactError):
        for entry in SubmissionLog.read(run).jobs:
            if entry.job is not None:
                clusters.setdefault(entry.cluster, {})[entry.job] = entry.kind
    attempts: list[JobAttempt] = []
    for cluster, jobs in clusters.items():
        # without --duplicates only the last start of a requeued job is listed; a group may share a run
        options = ["--allusers", "--duplicates", "--noheader", "--parsable2", "--noconvert", f"--format={FORMAT}"]
        where = [f"--jobs={','.join(jobs)}", *([f"--clusters={cluster}"] if cluster else [])]
        try:
            attempts += parse_accounting(run_slurm_command("sacct", *options, *where, timeout=ANSWER_SECONDS), jobs)
        except ExternalError:
            return {}
    keys = dict.fromkeys(each.key for each in attempts)
    return {key: JobUsage([each for each in attempts if each.key == key]) for key in keys}


def parse_accounting(answer: str, jobs: Mapping[str, str]) -> list[JobAttempt]:
    """Return the attempts in an answer of ``sacct``. Each one is followed by its steps.

    Args:
        answer: Lines of `FORMAT`, separated by ``|``. Other lines are ignored.
        jobs: The kind of each job of the run (``pretrain``, ``incubate`` and so on), by its id.
    """
    attempts: dict[str, JobAttempt] = {}  # the last one of each job or array task
    found = []
    for line in answer.splitlines():
        row = dict(zip(FIELDS, values := line.split("|", len(FIELDS)), strict=False))
        if len(values) <= len(FIELDS) or (name := re.fullmatch(r"(\d+)(?:_(\d+))?(\..+)?", row["JobID"])) is None:
            continue  # also "12_[4-7]", which are tasks that have not begun
        job, index, step = name.groups()
        task = row["JobID"].removesuffix(step or "")
        elapsed = parse_number(row["ElapsedRaw"])
        if step is None:
            attempts.pop(task, None)
            key = _phase_key(jobs[job], values[-1], index) if job in jobs else None
            if key is None or not elapsed:
                continue
            attempts[task] = JobAttempt(
                key,
                row["State"].partition(" ")[0] not in ("RUNNING", "COMPLETING", "SUSPENDED"),
                elapsed * parse_number(row["AllocNodes"]),
                parse_time(row["TotalCPU"]),
                parse_number(row["CPUTimeRAW"]),
            )
            found.append(attempts[task])
        if attempt := attempts.get(task):
            attempt.memory = max(attempt.memory, parse_size(row["MaxRSS"]))
            # not a sum: where energy is measured per node, each step counts what the others on it use too
            attempt.energy = max(attempt.energy, parse_number(row["ConsumedEnergyRaw"]))
    return found


def _phase_key(kind: str, job_name: str, index: str | None) -> str | None:
    """Return the key of the phase of a job, or None if it is an older job whose id Slurm has used again.

    Args:
        kind: The kind of the job.
        job_name: Its name, which ends with the kind. In ``NAME-incubate+1000``, index 7 of the array is module 1007.
        index: Its index in the array, if it is an array task.
    """
    if (name := re.search(rf"-{re.escape(kind)}(?:\+(\d+))?$", job_name)) is None:
        return None
    return f"{kind}/{int(name[1] or 0) + int(index or 0)}" if kind == "incubate" else kind


def parse_time(text: str) -> float:
    """Return the seconds in ``[[days-]hours:]minutes:seconds[.fraction]``; 0 for anything else."""
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+(?:\.\d+)?)", text)
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups()) if found else (0.0,) * 4
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_size(text: str) -> float:
    """Return the bytes in a size such as ``1234K`` or ``1.5G``; 0 for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)", text)
    return float(found[1]) * SIZES[found[2]] if found else 0.0


def parse_number(text: str) -> float:
    """Return a number; 0 for anything else, such as an empty field."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
