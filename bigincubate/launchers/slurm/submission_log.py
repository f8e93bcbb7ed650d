"""``jobs.json`` of a run: the jobs that were submitted, by which they are found in the queue.

A job is written down before ``sbatch`` runs, and its id when Slurm has accepted it. If the process ends in between, or
``sbatch`` does not answer, the job is looked up in the queue by its name and its log folder.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from ...config import Phase
from ...config.seeds import phase_key
from ...errors import ArtifactError, SystemResourceError
from ...files import is_present, read_json, write_json
from ...storage.checkpoint_verification import find_committed
from ...storage.record_types import ListOf, MapOf, Types, has_types
from ...storage.run_directory import RunDir
from .client import ENDED_STATES, hides_jobs_of_others, run_slurm_command

HELD_STATES = ("REQUEUE_HOLD", "SPECIAL_EXIT")
SUBMISSION_TYPES: Types = {
    "kind": str,
    "name": str,
    "job": str | None,
    "cluster": str | None,
    "modules": ListOf(int),
    "offset": int,
    "needs": ListOf(str),
    "waits_for_meta": bool,
    "user": int,
    "time": float,
}
LOG_TYPES: Types = {"jobs": ListOf(SUBMISSION_TYPES), "counts": MapOf(int), "checkpoints": MapOf(int)}


@dataclass(frozen=True)
class Submission:
    """A job that was submitted.

    Attributes:
        kind: ``pretrain``, ``incubate``, ``finetune``, ``end_to_end`` or ``gate``.
        name: Name of the job in Slurm.
        job: The job id; None if it is unknown whether Slurm has accepted the job.
        cluster: The cluster that it was submitted to; None for that of the submitting machine.
        modules: The modules of an array.
        offset: Difference between the number of a module and its index in the array.
        needs: Ids of jobs that must have ended first.
        waits_for_meta: Whether the first of them is the job of the meta model.
        user: User id of the submitting process.
        time: When it was submitted, in seconds since 1970.
    """

    kind: str
    name: str
    job: str | None = None
    cluster: str | None = None
    modules: tuple[int, ...] = ()
    offset: int = 0
    needs: tuple[str, ...] = ()
    waits_for_meta: bool = False
    user: int = field(default_factory=os.geteuid)
    time: float = field(default_factory=time.time)


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
        cluster: The cluster that the job was submitted to; None for that of this machine.
    """

    job: str
    kind: str
    module: int | None
    state: str
    node: str
    reason: str
    cluster: str | None = None

    @property
    def key(self) -> str:
        """Return the key of the phase that the job runs, such as ``incubate/3``."""
        return self.kind if self.module is None else f"{self.kind}/{self.module}"

    @property
    def held(self) -> bool:
        """Return whether the job starts only after a user or an administrator has released it."""
        return self.state in HELD_STATES or self.reason.startswith("JobHeld") or self.reason == "JobHoldMaxRequeue"


@dataclass
class SubmissionLog:
    """The content of ``jobs.json``.

    Attributes:
        run: The run directory.
        jobs: The submitted jobs, the oldest first.
        counts: Number of submissions of each phase in a row that brought no newer checkpoint, by key, since a user last
            called ``submit`` or ``resume``.
        checkpoints: Step of the newest checkpoint of each phase when it was last submitted.
    """

    run: RunDir
    jobs: list[Submission] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    checkpoints: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, run: RunDir) -> SubmissionLog:
        """Read the log of a run. It is empty if nothing was submitted.

        Raises:
            ArtifactError: It is damaged.
            OSError: It cannot be read.
        """
        file = run.path / "jobs.json"
        if not is_present(file):
            return cls(run)
        content: dict[str, Any] = read_json(file) or {}
        if not has_types(content, LOG_TYPES) or not all(map(_has_names, content["jobs"])):
            raise ArtifactError(
                f"{file} is damaged or of another version; cancel the jobs of this run with scancel, remove the file,"
                " and submit again"
            )
        entries = [{key: entry.get(key) for key in SUBMISSION_TYPES} for entry in content["jobs"]]
        jobs = [Submission(**entry | {key: tuple(entry[key]) for key in ("modules", "needs")}) for entry in entries]
        return cls(run, jobs, content["counts"], content["checkpoints"])

    def write(self) -> None:
        """Write the log."""
        content = {"jobs": list(map(asdict, self.jobs)), "counts": self.counts, "checkpoints": self.checkpoints}
        write_json(self.run.path / "jobs.json", content)

    def begin(self, submission: Submission) -> None:
        """Write down a job that will be submitted."""
        self.jobs.append(submission)
        self.write()

    def accept(self, job: str, cluster: str | None) -> Submission:
        """Write down the id of the last job, and count it as a submission of its phases."""
        self.jobs[-1] = replace(self.jobs[-1], job=job, cluster=cluster or self.jobs[-1].cluster)
        self._count(self.jobs[-1])
        self.write()
        return self.jobs[-1]

    def withdraw(self) -> None:
        """Remove the last job, which Slurm has refused."""
        del self.jobs[-1]
        self.write()

    def _count(self, submission: Submission) -> None:
        """Count a submission. A phase that has a newer checkpoint than at its last submission counts anew.

        Modules that wait for the meta model do not count: they may be canceled before they start.
        """
        if submission.kind == "incubate" and submission.waits_for_meta:
            return
        keys: Sequence[str] = [phase_key("incubate", module) for module in submission.modules] or [submission.kind]
        for key in keys:
            newest = self.newest_checkpoint(key)
            self.counts[key] = 1 + (0 if newest > self.checkpoints.get(key, newest) else self.counts.get(key, 0))
            self.checkpoints[key] = newest

    def submissions_without_progress(self, key: str) -> int:
        """Return how often a phase was submitted since it last wrote a newer checkpoint."""
        newest = self.newest_checkpoint(key)
        return 0 if newest > self.checkpoints.get(key, newest) else self.counts.get(key, 0)

    def newest_checkpoint(self, key: str) -> int:
        """Return the step of the newest checkpoint of a phase; -1 if it has none.

        Raises:
            OSError: The checkpoints cannot be read.
        """
        phase, _, module = key.partition("/")
        if phase == "gate":
            return -1
        folder = self.run.phase(cast(Phase, phase), int(module) if module else None)
        return max(find_committed(folder.checkpoints), default=-1)

    def find_lost_jobs(self, queued: Sequence[QueuedJob]) -> None:
        """Write down the ids of jobs whose submission was interrupted and which are in the queue; forget the others.

        Args:
            queued: The jobs of the run that are in the queue.
        """
        if all(entry.job for entry in self.jobs):
            return
        known = {entry.job for entry in self.jobs}
        found = {(entry.kind, entry.module): entry for entry in queued if entry.job not in known}
        for index, entry in enumerate(self.jobs):
            tasks = [(entry.kind, module) for module in entry.modules or (None,)]
            match = next((found[task] for task in tasks if task in found), None)
            if entry.job is None and match:
                self.jobs[index] = replace(entry, job=match.job, cluster=match.cluster)
                self._count(self.jobs[index])
        self.jobs = [entry for entry in self.jobs if entry.job]
        self.write()


def _has_names(entry: dict[str, Any]) -> bool:
    """Return whether the ids and names of a job can be arguments of Slurm's programs."""
    words = [entry["name"], *entry["needs"], *filter(None, (entry["job"], entry["cluster"]))]
    return all(map(str.isprintable, words))


def list_queued_jobs(run: RunDir) -> list[QueuedJob]:
    """Return the jobs of a run that are in the queue, found by the ids that were noted when they were submitted.

    Raises:
        SystemResourceError: If Slurm does not answer.
    """
    log = SubmissionLog.read(run)
    others = {entry.user for entry in log.jobs} - {os.geteuid()}
    if others and hides_jobs_of_others():
        users = ", ".join(map(str, sorted(others)))
        raise SystemResourceError(
            f"this cluster hides the jobs of other users, and the jobs of this run belong to user id {users}, who must"
            " continue it"
        )
    return [
        queued
        for cluster in sorted({entry.cluster or "" for entry in log.jobs})
        for queued in _list_cluster(run, [entry for entry in log.jobs if (entry.cluster or "") == cluster])
    ]


def _list_cluster(run: RunDir, submissions: Sequence[Submission]) -> Iterator[QueuedJob]:
    """Yield the jobs in the queue of one cluster."""
    cluster, users = submissions[0].cluster, ",".join(sorted({str(entry.user) for entry in submissions}))
    noted = {entry.job: entry for entry in submissions if entry.job}
    lost = {entry.name: entry for entry in submissions if entry.job is None}
    # only the jobs of these users are read: the queue of a large cluster has 100,000 entries
    answer = run_slurm_command(
        "squeue", "--noheader", "--array", f"--user={users}", "--format=%F|%K|%T|%N|%r|%j|%k", cluster=cluster
    )
    belongs: dict[str, bool] = {}
    for line in answer.splitlines():
        job, found, rest = line.partition("|")
        if not found or not (job in noted or lost):
            continue
        fields = rest.split("|", 5)
        if len(fields) < 6:
            continue  # another line of a site's script, or of a comment of several lines
        index, state, node, reason, name, comment = fields
        entry = noted.get(job)
        if entry is not None and entry.name != name and comment != run_comment(run):
            entry = None  # Slurm has given the id to another job: it was installed anew, or the run was copied
        if entry is None and name in lost:
            if job not in belongs:
                belongs[job] = comment == run_comment(run) or _writes_log_to(job, run, cluster)
            entry = lost[name] if belongs[job] else None
        if entry is not None and state not in ENDED_STATES:
            module = entry.offset + (int(index) if index.isdecimal() else 0) if entry.kind == "incubate" else None
            yield QueuedJob(job, entry.kind, module, state, node, reason, cluster)


def _writes_log_to(job: str, run: RunDir, cluster: str | None) -> bool:
    """Return whether the log of a job is in a run directory. Plugins of a site may change the comment of a job."""
    found = re.search(
        r"^\s*StdOut=(.*)/", run_slurm_command("scontrol", "show", "job", job, cluster=cluster), re.MULTILINE
    )
    return found is not None and os.path.realpath(found[1]) == os.path.realpath(run.path / "slurm")


def cancel_jobs(run: RunDir) -> list[str]:
    """Cancel all jobs of a run and return their ids. Running jobs write a checkpoint first.

    Raises:
        SystemResourceError: If Slurm does not answer.
    """
    canceled: list[tuple[str | None, str]] = []
    for _ in range(3):  # a gate may submit a job while its own cancellation is under way
        # cancel gates first, so that no gate submits new jobs in the meantime
        queued = sorted(list_queued_jobs(run), key=lambda entry: entry.kind != "gate")
        jobs = [job for job in dict.fromkeys((entry.cluster, entry.job) for entry in queued) if job not in canceled]
        for cluster in dict.fromkeys(cluster for cluster, _ in jobs):
            run_slurm_command("scancel", *(job for where, job in jobs if where == cluster), cluster=cluster)
        canceled += jobs
        if not jobs:
            break
    if canceled:
        run.log_event("cancelled", jobs=[job for _, job in canceled])
    return [job for _, job in canceled]


def run_comment(run: RunDir) -> str:
    """Return the comment of all jobs of a run: its directory."""
    return str(run.path.resolve())


def job_name(run: RunDir, kind: str, offset: int = 0) -> str:
    """Return the name of a job: that of the run, and its kind.

    In ``vit-incubate+1000``, index 7 of the array is module 1007.
    """
    name = re.sub(r"[^\w.-]", "_", run.path.resolve().name, flags=re.ASCII)[:64] or "run"
    return f"{name}-{kind}" + (f"+{offset}" if offset else "")
