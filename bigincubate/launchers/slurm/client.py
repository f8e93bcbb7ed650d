"""Client of Slurm's command-line programs: list, requeue and cancel the jobs of a run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import MissingDependencyError, SystemResourceError
from ...files import read_small_file
from ...storage.run_directory import RunDir

JOB_NAME_PREFIX = "bigincubate-"
DEFAULT_MAX_ARRAY_SIZE = 1001  # Slurm's default for MaxArraySize
ENDED_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("REVOKED", "TIMEOUT"),
}


@dataclass(frozen=True)
class QueuedJob:
    """A job or an array task of a run that has not ended.

    Attributes:
        job: The job id; for an array task, that of the array.
        kind: ``pretrain``, ``incubate``, ``finetune``, ``end_to_end`` or ``gate``.
        module: Index of the module, for ``incubate`` only.
        state: State of the job in Slurm, such as ``RUNNING`` or ``PENDING``.
        node: Names of the nodes it runs on; empty while it is pending.
        reason: Slurm's reason why the job is pending.
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


def run_slurm_command(*words: str, env: Mapping[str, str] | None = None, timeout: float = 120) -> str:
    """Run one of Slurm's programs and return its standard output.

    Args:
        words: The program and its arguments.
        env: Environment variables of the program; None for those of this process.
        timeout: Time limit in seconds.

    Raises:
        MissingDependencyError: If the program is not installed.
        SystemResourceError: If the program fails or exceeds the time limit.
    """
    if shutil.which(words[0]) is None:
        raise MissingDependencyError(f"{words[0]} not found: this command needs Slurm; use `bigincubate run` instead")
    try:
        ended = subprocess.run(words, capture_output=True, text=True, env=env, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise SystemResourceError(f"{words[0]} did not finish within {timeout:.0f} s; try again later") from None
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        raise SystemResourceError(f"{words[0]} failed: {lines[-1] if lines else ended.returncode}")
    return ended.stdout.strip()


def run_comment(run: RunDir) -> str:
    """Return the comment that identifies all jobs of a run, of any user."""
    return str(run.path.resolve())


def job_name(kind: str, offset: int = 0) -> str:
    """Return the name of a job. In ``bigincubate-incubate+1000``, index 7 of the array is module 1007."""
    return f"{JOB_NAME_PREFIX}{kind}" + (f"+{offset}" if offset else "")


def list_queued_jobs(run: RunDir) -> list[QueuedJob]:
    """Return the jobs of a run that are in the queue, which are identified by name and comment.

    Raises:
        SystemResourceError: If Slurm does not answer.
    """
    found = []
    for line in run_slurm_command("squeue", "--noheader", "--array", "--format=%F|%K|%T|%j|%N|%r|%k").splitlines():
        fields = line.split("|", 6)
        if len(fields) < 7:
            continue  # a line of the multi-line comment of another user's job
        job, index, state, name, node, reason, job_comment = fields
        if job_comment == run_comment(run) and name.startswith(JOB_NAME_PREFIX) and state not in ENDED_STATES:
            kind, _, offset = name.removeprefix(JOB_NAME_PREFIX).partition("+")
            module = int(offset or 0) + int(index) if kind == "incubate" else None
            found.append(QueuedJob(job, kind, module, state, node, reason))
    return found


def submit_job(command: Sequence[str], run: RunDir, kind: str, known: Collection[str]) -> str:
    """Run ``sbatch`` and return the id of the job.

    Args:
        command: The command.
        run: The run that the job belongs to, by which it is found in the queue if ``sbatch`` prints no id.
        kind: Kind of the job.
        known: Ids of jobs that were submitted before.

    Raises:
        SystemResourceError: If Slurm refuses or does not answer, or the id of the job is unknown.
    """
    answer = run_slurm_command(*command, env=environment_outside_job())
    if (job := parse_job_id(answer)) is not None:
        return job
    name = next((word.partition("=")[2] for word in command if word.startswith("--job-name=")), job_name(kind))
    queued = {entry.job for entry in list_queued_jobs(run) if entry.kind == kind}
    if new := sorted(queued.difference(known), key=int):
        return new[-1]
    printed = " ".join(answer.split())[:200] or "nothing"
    raise SystemResourceError(
        f"sbatch printed no job id ({printed}), and there is no new job {name} of this run in the queue; if there is"
        " one later, `bigincubate resume` finds it"
    )


def parse_job_id(answer: str) -> str | None:
    """Return the id in the answer of ``sbatch``, or None.

    Sites replace ``sbatch`` by scripts that print more lines, or that ignore ``--parsable``.

    Args:
        answer: ``12``, ``12;cluster`` or ``Submitted batch job 12 on cluster west``, possibly among other lines.
    """
    for pattern in (r"^\s*(\d+)(?:;[\w.-]+)?\s*$", r"submitted batch job (\d+)", r"\bjob(?:[ _-]?id)?\W{1,3}(\d+)\b"):
        if found := re.findall(pattern, answer, re.MULTILINE | re.IGNORECASE):
            return str(found[-1])
    return None


def query_job_state(job: str, timeout: float = 120) -> str:
    """Return the state of a job or an array task in Slurm, such as ``RUNNING`` or ``COMPLETING``.

    Args:
        job: Id of the job, or of an array task (``12_3``).
        timeout: Time limit in seconds.

    Raises:
        SystemResourceError: If Slurm does not answer or no longer knows the job.
    """
    answer = run_slurm_command("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job, timeout=timeout)
    return "\n".join(re.findall(r"^\s*([A-Z_]+)\s*$", answer, re.MULTILINE))  # without other lines of a site's script


def requeue_job(job: str) -> None:
    """Requeue a job or an array task.

    Raises:
        SystemResourceError: If Slurm refuses.
    """
    run_slurm_command("scontrol", "requeue", job)


def query_max_array_size() -> int:
    """Return Slurm's MaxArraySize. The indices of an array are smaller.

    Raises:
        SystemResourceError: If Slurm does not answer.
    """
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run_slurm_command("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else DEFAULT_MAX_ARRAY_SIZE


LOG_NAME = re.compile(
    rf"{JOB_NAME_PREFIX}(?P<kind>[a-z_]+)(?:\+(?P<offset>\d+))?_(?P<job>\d+)(?:_(?P<index>\d+))?(?:\.(?P<rank>\d+))?\.out"
)
KINDS = ("pretrain", "incubate", "finetune", "end_to_end", "gate")


def list_job_logs(run: RunDir, module: int | None = None) -> list[Path]:
    """Return the logs of jobs and of their ranks, of the whole run or of one module, in the order of the pipeline.

    A job is followed by its ranks, and a job that was submitted again by the later one.
    """
    found = []
    for file in (run.path / "slurm").glob(f"{JOB_NAME_PREFIX}*.out"):
        if (name := LOG_NAME.fullmatch(file.name)) is None or name["kind"] not in KINDS:
            continue
        own = int(name["offset"] or 0) + int(name["index"]) if name["index"] else None
        if module in (None, own):
            order = KINDS.index(name["kind"]), -1 if own is None else own, int(name["job"]), int(name["rank"] or -1)
            found.append((order, file))
    return [file for _, file in sorted(found)]


def read_job_trace(run: RunDir, key: str) -> str:
    """Return why the last job of a phase, or the gate, could not start bigincubate; empty if it could.

    The scripts in ``slurm/`` write and remove this file.
    """
    try:
        text = read_small_file(run.path / "slurm" / f"{key.replace('/', '-')}.error").decode(errors="replace")
    except OSError:
        return ""
    return text.strip()


def cancel_jobs(run: RunDir) -> list[str]:
    """Cancel all jobs of a run and return their ids. Running jobs write a checkpoint first.

    Raises:
        SystemResourceError: If Slurm does not answer.
    """
    # cancel gates first, so that no gate submits new jobs in the meantime
    queued = sorted(list_queued_jobs(run), key=lambda entry: entry.kind != "gate")
    ids = list(dict.fromkeys(entry.job for entry in queued))
    if ids:
        run_slurm_command("scancel", *ids)
        run.log_event("cancelled", jobs=ids)
    return ids


def environment_outside_job() -> dict[str, str]:
    """Return the environment variables of this process, without those of a Slurm job that it may run in."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
