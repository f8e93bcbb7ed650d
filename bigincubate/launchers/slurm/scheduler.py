"""Schedule a run on Slurm: submit the missing jobs, and a *gate*, a small job that later submits the next ones.

::

    pretrain ──afterok──▶ incubate (array, one task per module) ──afterany──▶ gate ──▶ finetune ──afterany──▶ gate

The gate and the commands ``submit`` and ``resume`` call :func:`submit_missing_jobs`, which checks which phases are done
(hashes and lineage) and which jobs are in the queue, and submits the rest. Therefore no job waits for a job that cannot
succeed, modules start only after the meta model, the large allocation of fine-tuning is requested only when all modules
are done, and submitting again is safe. Only jobs that Slurm has accepted count; after ``slurm.max_submissions``
submissions of a phase without a newer checkpoint, the run stops until a user calls ``resume``.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence

from ...config import Recipe
from ...errors import ArtifactError, SystemResourceError, format_command, format_count
from ...planning.job_graph import Job
from ...planning.lineage import expected_lineage
from ...storage.artifacts import check_lineage, verify_artifact
from ...storage.lease import Lease, acquire_lease
from ...storage.run_directory import RunDir
from .client import JobRefusedError, query_max_array_size, run_slurm_command, submit_job
from .job_logs import write_gate_trace
from .job_queue import SlurmQueue
from .sbatch import build_sbatch_command, split_into_arrays
from .submission_log import QueuedJob, Submission, SubmissionLog, job_name, list_queued_jobs

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
        SystemResourceError: If Slurm refuses a job or does not answer.
        LockedError: If another process is submitting.
    """
    with acquire_lease(run.path / "slurm", queue=SlurmQueue()) as lease:
        missing = [job for job in graph if not _is_valid(job, run)]
        if not missing:
            return True
        if gate and not recipe.slurm.submit_from_jobs:
            titles = ", ".join(job.title for job in missing)
            say(f"missing: {titles}; continue with: {format_command('resume', run.path)}")
            return False
        queued = [entry for entry in list_queued_jobs(run) if entry.job != gate]
        submitter = JobSubmitter(recipe, run, say, queued, lease, reset_counts=gate is None)
        submitter.submit_phases(missing)
        submitter.submit_gate()
        submitter.report(missing, gate)
    return False


class JobSubmitter:
    """Submits the missing jobs of a run.

    Attributes:
        log: The submitted jobs and the numbers of submissions.
        active: Ids of the jobs in the queue, by the key of their phase.
        gates: Ids of the pending gates. A running gate does not count: it may have read the queue already.
        submitted: The jobs that this object has submitted.
        problems: Which jobs were not submitted, and why.
    """

    def __init__(
        self, recipe: Recipe, run: RunDir, say: Say, queued: Sequence[QueuedJob], lease: Lease, *, reset_counts: bool
    ) -> None:
        """Create a submitter.

        Args:
            recipe: The recipe of the run.
            run: The run directory.
            say: Prints a line.
            queued: The jobs of the run that are in the queue, without the calling gate.
            lease: The lease on submitting, checked before each submission.
            reset_counts: Whether to forget the numbers of submissions so far.
        """
        self.recipe, self.run, self.say, self.queued, self.lease = recipe, run, say, queued, lease
        self.log = SubmissionLog.read(run)
        self.log.find_lost_jobs(queued)
        if reset_counts:
            self.log.counts, self.log.checkpoints = {}, {}
            self.log.write()
        self.active = {entry.key: entry.job for entry in queued if entry.kind != "gate"}
        self.gates = [entry.job for entry in queued if entry.kind == "gate" and entry.state == "PENDING"]
        self.submitted: list[Submission] = []
        self.problems: list[str] = []

    def submit_phases(self, missing: Sequence[Job]) -> None:
        """Submit the phases that can start, and modules whose meta model has a job in the queue.

        Args:
            missing: The phases that are not done.
        """
        absent = {job.key for job in missing}
        if "pretrain" in absent:  # modules that waited for the meta model have not started
            self.log.counts = {key: count for key, count in self.log.counts.items() if not key.startswith("incubate/")}
        for phase in ("pretrain", "incubate", "finetune", "end_to_end"):
            jobs = [job for job in missing if job.phase == phase and job.key not in self.active]
            if phase == "incubate" and "pretrain" in absent and "pretrain" not in self.active:
                continue
            if phase == "finetune" and not all(absent.isdisjoint(job.needs) for job in jobs):
                continue
            allowed = [job for job in jobs if self._submissions(job) < self.recipe.slurm.max_submissions]
            try:
                if phase == "incubate":
                    self._submit_modules([job.module for job in allowed if job.module is not None])
                elif allowed:
                    self._submit(phase)
            except SystemResourceError as error:
                self._note_problem(phase, error)

    def submit_gate(self) -> None:
        """Submit a gate that runs after all jobs in the queue, unless one is pending."""
        while self.active and not self.gates:
            try:
                gate = self._submit("gate", after=sorted(set(self.active.values()), key=int))
            except SystemResourceError as error:
                if isinstance(error, JobRefusedError) and error.at_limit and self._make_room():
                    continue
                self._note_problem("gate", error)
                return
            self.gates.append(str(gate.job))

    def report(self, missing: Sequence[Job], calling_gate: str | None) -> None:
        """Say what is in the queue, and raise an error if the run cannot continue by itself.

        Args:
            missing: The phases that were not done.
            calling_gate: Id of this job if it is a gate.

        Raises:
            ArtifactError: If nothing is in the queue, and a phase has reached the maximum number of submissions.
            SystemResourceError: If a job was not submitted.
        """
        jobs = sorted({*self.active.values(), *self.gates}, key=int)
        held = {entry.job: entry for entry in self.queued if entry.held}  # one of the tasks of each array
        for job, entry in held.items():
            self.say(
                f"{entry.kind}: job {job} is held ({entry.reason}); find out why, then release it with:"
                f" scontrol release {job}"
            )
        if self.problems:
            resume = format_command("resume", self.run.path)
            after = f"nothing is in the queue; correct the cause, then: {resume}"
            if jobs:
                gate = f"the gate (job {', '.join(self.gates)}) tries again when they have ended"
                after = f"in the queue: {', '.join(jobs)}; {gate if self.gates else f'when they have ended: {resume}'}"
            text = f"{'; '.join(self.problems)}; {after}"
            if calling_gate and self.gates:
                self.say(text)
                write_gate_trace(self.run, calling_gate, text)
                return
            raise SystemResourceError(text)
        if not jobs:
            words = "; ".join(
                f"{job.title}: submitted {format_count(count, 'time')}{_last_error(job, self.run)}"
                for job in missing
                if (count := self._submissions(job))
            )
            raise ArtifactError(f"given up: {words}. Fix the problem, then: {format_command('resume', self.run.path)}")
        if not self.submitted:
            self.say(f"in the queue already: {', '.join(jobs)}")

    def _note_problem(self, kind: str, error: SystemResourceError) -> None:
        """Note why a job was not submitted."""
        refused = f"Slurm refused {kind}: {error}"
        unknown = f"{kind}: {error}; Slurm may have accepted the job all the same"
        self.problems.append(refused if isinstance(error, JobRefusedError) else unknown)

    def _submissions(self, job: Job) -> int:
        return self.log.submissions_without_progress(job.key)

    def _submit_modules(self, modules: Sequence[int]) -> None:
        """Submit modules in as many arrays as Slurm requires, and as many modules as its limits allow.

        Args:
            modules: The modules.

        Raises:
            JobRefusedError: If Slurm accepts no module.
        """
        if not modules:
            return
        meta, parallel = self.active.get("pretrain"), self.recipe.slurm.array_parallelism
        size = query_max_array_size(self._cluster("incubate", [meta] if meta else []))
        # with a limit of parallel tasks, arrays run one after another; jobs without an array wait for an earlier job
        lag = 0 if parallel is None else 1 if size else parallel
        waiting, accepted, limit = list(split_into_arrays(modules, size)), list[Submission](), ""
        while waiting:
            offset, group = waiting.pop(0)
            after = [str(accepted[-lag].job)] if 0 < lag <= len(accepted) else []
            try:
                accepted.append(self._submit("incubate", group, offset, after=after, in_array=size > 0))
            except JobRefusedError as error:
                if not error.at_limit or (len(group) == 1 and not accepted):
                    raise
                limit, waiting = str(error), [(offset, group[: len(group) // 2])] if len(group) > 1 else []
        if left := len(modules) - sum(len(entry.modules) for entry in accepted):
            self.say(f"incubate: the gate will submit {left} of {len(modules)} modules, because of a limit ({limit})")

    def _make_room(self) -> bool:
        """Replace the last array by its first half, so that Slurm's limits leave room for the gate.

        Returns:
            Whether there was such an array.
        """
        last = next((entry for entry in reversed(self.submitted) if entry.kind == "incubate"), None)
        if last is None or len(last.modules) == len(self.active) == 1:
            return False
        try:
            if any(entry.job == last.job and entry.state != "PENDING" for entry in list_queued_jobs(self.run)):
                return False  # training is not interrupted
            run_slurm_command("scancel", str(last.job), cluster=last.cluster)
        except SystemResourceError as error:
            self._note_problem("incubate", error)
            return False
        self.submitted.remove(last)
        for module in last.modules:
            self.active.pop(f"incubate/{module}")
            self.log.counts[f"incubate/{module}"] = max(0, self.log.counts.get(f"incubate/{module}", 0) - 1)
        if half := last.modules[: len(last.modules) // 2]:
            try:
                self._submit("incubate", half, last.offset, after=last.needs)
            except SystemResourceError as error:  # the gate submits them, if other jobs are left
                self._note_problem("incubate", error)
        return True

    def _submit(
        self,
        kind: str,
        modules: Sequence[int] = (),
        offset: int = 0,
        *,
        after: Sequence[str] = (),
        in_array: bool = True,
    ) -> Submission:
        """Submit a job.

        Args:
            kind: The phase, or ``gate``.
            modules: The modules of an array.
            offset: Difference between the number of a module and its index in the array.
            after: Ids of jobs that must have ended first, successfully or not.
            in_array: Whether modules are submitted as an array.

        Raises:
            JobRefusedError: If Slurm refuses the job.
            SystemResourceError: If it is unknown whether Slurm has accepted the job.
        """
        meta = self.active.get("pretrain") if kind == "incubate" else None
        after = [job for job in after if job != meta]
        needs = (*([meta] if meta else []), *after)
        cluster = self._cluster(kind, needs)
        command = build_sbatch_command(
            self.recipe,
            self.run,
            kind,
            modules=modules if in_array else (),
            offset=offset,
            after=after,
            after_success=[meta] if meta else [],
            cluster=cluster,
        )
        name = job_name(self.run, kind, offset)
        self.lease.check()
        entry = Submission(
            kind,
            name,
            cluster=cluster,
            modules=tuple(modules),
            offset=offset,
            needs=needs,
            waits_for_meta=meta is not None,
        )
        self.log.begin(entry)
        try:
            job, cluster = submit_job(command)
        except JobRefusedError:
            self.log.withdraw()
            raise
        entry = self.log.accept(job, cluster) if job else self._find_job_without_id(name)
        self.submitted.append(entry)
        self.run.log_event("submitted", job=entry.job, kind=kind, modules=list(modules), needs=list(needs))
        if kind != "gate":
            keys = [f"incubate/{module}" for module in modules] or [kind]
            self.active |= dict.fromkeys(keys, str(entry.job))
        which = f" of modules {', '.join(map(str, modules))}" if modules else ""
        waits = f", after {', '.join(needs)}" if needs else ""
        self.say(f"{kind}{which}: job {entry.job}{waits}")
        return entry

    def _cluster(self, kind: str, needs: Sequence[str]) -> str | None:
        """Return the cluster to which a job is submitted: that of the jobs it waits for, or that of the recipe.

        Args:
            kind: The phase, or ``gate``.
            needs: Ids of jobs that must have ended first. Other clusters do not know them.
        """
        home = next((entry.cluster for entry in reversed(self.log.jobs) if entry.job in needs), None)
        chosen = (option for option in self.recipe.slurm.job(kind).extra if option.startswith("--clusters="))
        return home or next((option.partition("=")[2] for option in chosen), None)

    def _find_job_without_id(self, name: str) -> Submission:
        """Return the last job with the id that it has in the queue; ``sbatch`` printed none.

        Raises:
            SystemResourceError: If it is not in the queue.
        """
        known = {entry.job for entry in self.log.jobs}
        self.log.find_lost_jobs(list_queued_jobs(self.run))
        last = self.log.jobs[-1] if self.log.jobs else None
        if last is None or last.job in known or last.name != name:
            raise SystemResourceError(
                f"sbatch printed no job id, and there is no new job {name} in the queue; if there is one later,"
                f" this command finds it: {format_command('resume', self.run.path)}"
            )
        return last


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
        if stale:  # before the result: a phase without one resumes from its checkpoints
            shutil.rmtree(folder.checkpoints, ignore_errors=True)
        (folder.path / "DONE").unlink()
    return problem is None


def _last_error(job: Job, run: RunDir) -> str:
    attempts = run.phase(job.phase, job.module).read_attempts()
    error = attempts[-1].get("error") if attempts else None
    return f" ({error})" if error else ""
