"""A run on Slurm: what is missing is submitted, and after it a *gate*, a small job that looks again.

::

    pretrain ──afterany──▶ incubate (array, a task a module) ──afterany──▶ gate ──▶ finetune ──afterany──▶ gate

The gate calls :func:`advance`, as ``submit`` and ``resume`` do: one function, which looks at what is there (lineage and
hashes), at what is in the queue, and submits the rest. So nothing waits on a job that cannot end well, no large
allocation is asked for before the modules are there, and submitting again is safe. How often a phase was submitted is
written down before each ``sbatch``; after ``slurm.rounds`` times a person must look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ..checkpoint.lock import owned
from ..checkpoint.store import check_module, load_manifest, verify_artifact
from ..config import Recipe
from ..errors import ArtifactError
from ..files import read_json, write_json
from ..planning.job_graph import Job
from ..rundir import RunDir
from .env import RunEnv
from .sbatch import arrays, environment, sbatch
from .slurm import array_size, call, clean_environment, queue

Say = Callable[[str], None]
Digest = Callable[[int | None], str]


def advance(
    recipe: Recipe, graph: Sequence[Job], run: RunDir, *, data: Digest, gate: str | None = None, say: Say = print
) -> bool:
    """Submit what is missing and not in the queue, and a gate after it. Gives whether everything is done.

    Args:
        data: the digest of the data that a module sees.
        gate: the id of the job that calls, where a gate does; a person's call forgets how often phases were submitted.

    Raises:
        ArtifactError: a phase was submitted as often as it may be.
        EnvironmentFault: Slurm does not answer.
        LockedError: another process is submitting.
    """
    with owned(run.path / "slurm", RunEnv()):
        desk = Desk(recipe, run, say, rounds=book(run)["rounds"] if gate else {})
        missing = [job for job in graph if not _good(job, recipe, run, data)]
        if not missing:
            return True
        if gate and not recipe.slurm.self_submit:
            say(f"missing: {', '.join(job.title for job in missing)}; go on with: bigincubate resume {run.path}")
            return False
        queued = [entry for entry in queue(run) if entry.job != gate]
        active = {entry.key: {entry.job} for entry in queued if entry.kind != "gate"}
        # a gate that has begun may have looked already
        waiting = any(entry.kind == "gate" and entry.state == "PENDING" for entry in queued)
        absent = [job for job in missing if job.key not in active]
        modules = any(job.phase == "incubate" for job in missing)
        ready = [job for job in absent if job.phase != "finetune" or not modules]
        wanted = [job for job in ready if desk.rounds.get(job.key, 0) < recipe.slurm.rounds]
        for phase in ("pretrain", "incubate", "finetune", "end_to_end"):
            jobs = [job for job in wanted if job.phase == phase]
            if jobs:
                needs = sorted(active.get("pretrain", ())) if phase == "incubate" else []
                numbers = desk.submit(phase, jobs, needs)
                active |= dict.fromkeys((job.key for job in jobs), numbers)
        waited = sorted(set().union(*active.values()), key=int)
        if not waited:
            words = "; ".join(
                f"{job.title}: submitted {desk.rounds[job.key]} times{_last_error(job, run)}" for job in ready
            )
            raise ArtifactError(f"given up: {words}. See why, then: bigincubate resume {run.path}")
        if not waiting:
            desk.submit("gate", [], waited)
        if not wanted:
            say(f"in the queue already: {', '.join(waited)}")
    return False


class Desk:
    """Where jobs are submitted, and what was is written down in ``jobs.json``."""

    def __init__(self, recipe: Recipe, run: RunDir, say: Say, rounds: dict[str, int]) -> None:
        self.recipe, self.run, self.say, self.rounds = recipe, run, say, rounds

    def submit(self, kind: str, jobs: Sequence[Job], needs: Sequence[str]) -> set[str]:
        """Jobs of one kind; modules in as many arrays as they need. Gives the ids."""
        self.rounds |= {job.key: self.rounds.get(job.key, 0) + 1 for job in jobs}
        modules = [job.module for job in jobs if job.module is not None]
        if not modules:
            return {self._submit(kind, [], 0, needs)}
        numbers: list[str] = []
        for offset, group in arrays(modules, array_size()):
            # one array after another where only so many tasks may run
            after = numbers[-1:] if self.recipe.slurm.concurrency else []
            numbers.append(self._submit(kind, group, offset, [*needs, *after]))
        return set(numbers)

    def _submit(self, kind: str, modules: Sequence[int], offset: int, needs: Sequence[str]) -> str:
        command = sbatch(self.recipe, self.run, kind, modules=modules, offset=offset, needs=needs)
        before = book(self.run) | {"rounds": self.rounds}
        write_json(self.run.path / "jobs.json", before)  # before sbatch: a count that is lost could go on for ever
        number = call(*command, env=clean_environment() | environment(self.recipe, offset)).partition(";")[0]
        entry = {"job": number, "kind": kind, "modules": list(modules), "needs": list(needs), "time": time.time()}
        write_json(self.run.path / "jobs.json", {**before, "jobs": [*before["jobs"], entry]})
        self.run.note("submitted", **entry)
        which = f" of modules {', '.join(map(str, modules))}" if modules else ""
        after = f", after {', '.join(needs)}" if needs else ""
        self.say(f"{kind}{which}: job {number}{after}")
        return number


def book(run: RunDir) -> dict[str, Any]:
    """``jobs``: what was submitted, and after what; ``rounds``: how often each phase was, since a person looked."""
    return {"jobs": [], "rounds": {}, **(read_json(run.path / "jobs.json") or {})}


def _good(job: Job, recipe: Recipe, run: RunDir, data: Digest) -> bool:
    """Whether a phase is done and what it hands on is sound. What is not is forgotten, to be made again."""
    folder = run.phase(job.phase, job.module)
    if folder.result is None:
        return False
    problem = None
    try:
        verify_artifact(folder.artifact)
        if job.phase == "incubate":
            meta = load_manifest(run.phase("pretrain").artifact).digest
            problem = check_module(folder.artifact, recipe=recipe.digest, meta=meta, data=data(job.module))
    except ArtifactError as error:
        problem = str(error)
    if problem:
        run.note("made_again", phase=job.key, reason=problem)
        (folder.path / "DONE").unlink()
    return problem is None


def _last_error(job: Job, run: RunDir) -> str:
    attempts = run.phase(job.phase, job.module).attempts()
    error = attempts[-1].get("error") if attempts else None
    return f" ({error})" if error else ""
