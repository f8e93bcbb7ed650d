"""Schedule a run on Slurm: submit the missing jobs, and a *gate*, a small job that later submits the next ones.

::

    pretrain ──afterany──▶ incubate (array, one task per module) ──afterany──▶ gate ──▶ finetune ──afterany──▶ gate

The gate and the commands ``submit`` and ``resume`` call :func:`submit_missing_jobs`, which checks which phases are done
(hashes and lineage) and which jobs are in the queue, and submits the rest. Therefore no job waits for a job that cannot
succeed, the large allocation of fine-tuning is requested only when all modules are done, and submitting again is safe.
The number of submissions of each phase is saved before each ``sbatch``; after ``slurm.max_submissions`` submissions the
run stops until a user calls ``resume``.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...config import Recipe
from ...distributed.process_group import DistributedContext
from ...errors import ArtifactError, format_command
from ...files import read_json, write_json
from ...planning.job_graph import Job
from ...planning.lineage import expected_lineage
from ...storage.artifacts import check_lineage, verify_artifact
from ...storage.lease import acquire_lease
from ...storage.run_directory import RunDir
from .client import list_queued_jobs, query_max_array_size, submit_job
from .job_queue import SlurmQueue
from .sbatch import build_sbatch_command, split_into_arrays

Say = Callable[[str], None]


def submit_missing_jobs(
    recipe: Recipe, graph: Sequence[Job], run: RunDir, *, gate: str | None = None, say: Say = print
) -> bool:
    """Submit the jobs that are neither done nor in the queue, and a gate that runs after them.

    Args:
        recipe: The recipe of the run.
        graph: The jobs of the run.
        run: The run directory.
        gate: Id of the calling job if it is a gate. None for a call by a user, which resets the numbers of
            submissions.
        say: Prints a line.

    Returns:
        Whether all jobs are done.

    Raises:
        ArtifactError: If a phase has reached the maximum number of submissions.
        SystemResourceError: If Slurm does not answer.
        LockedError: If another process is submitting.
    """
    with acquire_lease(run.path / "slurm", DistributedContext(), SlurmQueue()):
        submitter = JobSubmitter(recipe, run, say, submissions=read_submission_log(run)["submissions"] if gate else {})
        missing = [job for job in graph if not _is_valid(job, run)]
        if not missing:
            return True
        if gate and not recipe.slurm.submit_from_jobs:
            titles = ", ".join(job.title for job in missing)
            say(f"missing: {titles}; continue with: {format_command('resume', run.path)}")
            return False
        queued = [entry for entry in list_queued_jobs(run) if entry.job != gate]
        active = {entry.key: {entry.job} for entry in queued if entry.kind != "gate"}
        # only a pending gate counts: a running one may have read the queue already
        gate_pending = any(entry.kind == "gate" and entry.state == "PENDING" for entry in queued)
        absent = [job for job in missing if job.key not in active]
        modules_missing = any(job.phase == "incubate" for job in missing)
        ready = [job for job in absent if job.phase != "finetune" or not modules_missing]
        allowed = [job for job in ready if submitter.submissions.get(job.key, 0) < recipe.slurm.max_submissions]
        for phase in ("pretrain", "incubate", "finetune", "end_to_end"):
            jobs = [job for job in allowed if job.phase == phase]
            if jobs:
                needs = sorted(active.get("pretrain", ())) if phase == "incubate" else []
                ids = submitter.submit(phase, jobs, needs)
                active |= dict.fromkeys((job.key for job in jobs), ids)
        gate_needs = sorted(set().union(*active.values()), key=int)
        if not gate_needs:
            words = "; ".join(
                f"{job.title}: submitted {submitter.submissions[job.key]} times{_last_error(job, run)}" for job in ready
            )
            raise ArtifactError(f"given up: {words}. Fix the problem, then: {format_command('resume', run.path)}")
        if not gate_pending:
            submitter.submit("gate", [], gate_needs)
        if not allowed:
            say(f"in the queue already: {', '.join(gate_needs)}")
    return False


class JobSubmitter:
    """Submits jobs and records them in ``jobs.json``."""

    def __init__(self, recipe: Recipe, run: RunDir, say: Say, submissions: dict[str, int]) -> None:
        """Create a submitter.

        Args:
            recipe: The recipe of the run.
            run: The run directory.
            say: Prints a line.
            submissions: Number of submissions so far, by the key of the phase.
        """
        self.recipe, self.run, self.say, self.submissions = recipe, run, say, submissions

    def submit(self, kind: str, jobs: Sequence[Job], needs: Sequence[str]) -> set[str]:
        """Submit jobs of one kind, modules in as many arrays as Slurm requires, and return the job ids.

        Args:
            kind: The phase, or ``gate``.
            jobs: The jobs; none for a gate.
            needs: Ids of jobs that must have ended first.
        """
        self.submissions |= {job.key: self.submissions.get(job.key, 0) + 1 for job in jobs}
        modules = [job.module for job in jobs if job.module is not None]
        ids: list[str] = []
        for offset, group in split_into_arrays(modules, query_max_array_size()) if modules else [(0, modules)]:
            # if the number of parallel tasks is limited, arrays run one after another
            after = ids[-1:] if self.recipe.slurm.array_parallelism else []
            ids.append(self._submit_job(kind, group, offset, [*needs, *after]))
        return set(ids)

    def _submit_job(self, kind: str, modules: Sequence[int], offset: int, needs: Sequence[str]) -> str:
        command = build_sbatch_command(self.recipe, self.run, kind, modules=modules, offset=offset, needs=needs)
        log = read_submission_log(self.run) | {"submissions": self.submissions}
        write_json(self.run.path / "jobs.json", log)  # before sbatch: a lost count would allow endless retries
        job = submit_job(command, self.run, kind, known={entry["job"] for entry in log["jobs"]})
        entry = {"job": job, "kind": kind, "modules": list(modules), "needs": list(needs), "time": time.time()}
        write_json(self.run.path / "jobs.json", {**log, "jobs": [*log["jobs"], entry]})
        self.run.log_event("submitted", **entry)
        which = f" of modules {', '.join(map(str, modules))}" if modules else ""
        after = f", after {', '.join(needs)}" if needs else ""
        self.say(f"{kind}{which}: job {job}{after}")
        return job


def read_submission_log(run: RunDir) -> dict[str, Any]:
    """Read ``jobs.json``.

    Returns:
        ``jobs``, the submitted jobs with their dependencies, and ``submissions``, the number of submissions of each
        phase since a user last called ``submit`` or ``resume``.
    """
    return {"jobs": [], "submissions": {}, **(read_json(run.path / "jobs.json") or {})}


def _is_valid(job: Job, run: RunDir) -> bool:
    """Return whether a phase is done and its artifact is valid; if the artifact is invalid, mark the phase as not done.

    A phase with a damaged artifact resumes from its last checkpoint; a phase with a stale artifact starts over.
    """
    folder = run.phase(job.phase, job.module)
    if folder.result is None:
        return False
    stale = None
    try:
        manifest = verify_artifact(folder.artifact)
        with contextlib.suppress(ArtifactError):  # the lineage is checked later, when the input artifacts exist
            stale = check_lineage(manifest, expected_lineage(run, job.phase, job.module))
        problem = stale
    except ArtifactError as error:
        problem = str(error)
    if problem:
        run.log_event("made_again", phase=job.key, reason=problem)
        (folder.path / "DONE").unlink()
    if stale:
        shutil.rmtree(folder.checkpoints)
    return problem is None


def _last_error(job: Job, run: RunDir) -> str:
    attempts = run.phase(job.phase, job.module).read_attempts()
    error = attempts[-1].get("error") if attempts else None
    return f" ({error})" if error else ""
