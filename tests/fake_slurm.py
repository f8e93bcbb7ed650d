"""A Slurm in this process whose faults are drawn: refusals, lost answers, crashes, held jobs, lost gates, slow Epilogs.

A test can also plan the faults of certain jobs.

It replaces ``run_slurm_command``, so that the scheduler, the log of submissions and the reader of the queue are real.
What jobs do is simulated.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

import pytest

from bigincubate.config import Phase, Recipe
from bigincubate.errors import ArtifactError, BigincubateError, SystemResourceError
from bigincubate.launchers.slurm import client, scheduler, submission_log
from bigincubate.planning.job_graph import Job
from bigincubate.storage.run_directory import RunDir

OVER = {"COMPLETED", "FAILED", "CANCELLED"}
LIMIT = "QOSMaxSubmitJobPerUserLimit; Batch job submission failed: Job violates policy (job submit limit)"


@dataclass
class Task:
    """A job or a task of an array."""

    state: str = "PENDING"
    reason: str = "Resources"
    left: int = 0  # steps until it ends, or until its Epilog does
    outcome: str = ""


@dataclass
class FakeJob:
    """A submitted job."""

    kind: str
    name: str
    comment: str
    log: str
    offset: int
    after: list[str]
    after_success: list[str]
    tasks: dict[int | None, Task] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return all(task.state in OVER for task in self.tasks.values())

    @property
    def succeeded(self) -> bool:
        return all(task.state == "COMPLETED" for task in self.tasks.values())


@dataclass
class FakeSlurm:
    """See the module.

    Attributes:
        run: The run directory.
        seed: Draws all faults.
        modules: Numbers of the modules that the run incubates.
        submit_limit: Tasks that may be in the queue.
        max_array_size: Slurm's ``MaxArraySize``.
        fault: Probability of each kind of fault.
        answers: Faults of the next submissions of a kind of job, by kind, besides those that are drawn. An item may
            name several, such as ``"answer lost, comment overwritten"``.
        outcomes: How a phase ends the next times that it starts, by key: ``"well"``, ``"crash"``, ``"requeue"``,
            ``"hold"``, or ``"stop"`` (with a newer checkpoint, at a site that does not let jobs requeue themselves).
    """

    run: RunDir
    seed: int
    modules: Sequence[int]
    submit_limit: int = 10**9
    max_array_size: int = 1001
    fault: float = 0.03
    answers: dict[str, list[str]] = field(default_factory=dict)
    outcomes: dict[str, list[str]] = field(default_factory=dict)
    jobs: dict[str, FakeJob] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    faults: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def draw(self, name: str, probability: float | None = None) -> bool:
        """Return whether a fault happens, and count it."""
        happens = self.random.random() < (self.fault if probability is None else probability)
        self.faults[name] += happens
        return happens

    # ------------------------------------------------------------------------------------- the programs

    def command(self, *words: str, cluster: str | None = None, timeout: float = 120, both: bool = False) -> str:
        """Answer as one of Slurm's programs does."""
        if self.draw("no answer", self.fault / 3):
            raise SystemResourceError(f"{words[0]} did not finish within 120 s; try again later")
        return {
            "sbatch": self.sbatch,
            "squeue": self.squeue,
            "scancel": self.scancel,
            "scontrol": self.scontrol,
        }[words[0]](list(words[1:]))

    def sbatch(self, words: list[str]) -> str:
        options = {name: value for word in words if word.startswith("--") for name, _, value in [word.partition("=")]}
        found = re.search(r"-(pretrain|incubate|finetune|end_to_end|gate)(?:\+(\d+))?$", options["--job-name"])
        assert found is not None
        indices: list[int | None] = [None]
        if "--array" in options:
            indices = [int(index) for index in options["--array"].partition("%")[0].split(",")]
            assert all(index < self.max_array_size for index in indices if index is not None)
        planned = self.answers[found[1]].pop(0) if self.answers.get(found[1]) else ""
        if self.draw("refused") or "refused" in planned:
            raise SystemResourceError("sbatch failed: invalid partition specified: gpu; Batch job submission failed")
        if self.waiting() + len(indices) > self.submit_limit:
            self.faults["at the limit"] += 1
            raise SystemResourceError(f"sbatch failed: {LIMIT}")
        depends: dict[str, list[str]] = {}
        for part in filter(None, options.get("--dependency", "").split(",")):
            how, *ids = part.split(":")
            depends[how] = ids
        job = FakeJob(
            found[1],
            options["--job-name"],
            "a plugin's" if self.draw("comment overwritten") or "comment" in planned else options["--comment"],
            options["--output"],
            int(found[2] or 0),
            depends.get("afterany", []),
            depends.get("afterok", []),
            {index: Task() for index in indices},
        )
        number = str(len(self.jobs) + 100)
        self.jobs[number] = job
        if self.draw("answer lost") or "answer lost" in planned:
            raise SystemResourceError("sbatch failed: Batch job submission failed: Socket timed out on send/recv")
        if self.draw("no id") or "no id" in planned:
            return "the site thanks you"
        return f"*** 120 nodes ***\n{number}"

    def waiting(self) -> int:
        return sum(task.state not in OVER for job in self.jobs.values() for task in job.tasks.values())

    def squeue(self, words: list[str]) -> str:
        assert "--array" in words
        return "\n".join(
            f"{number}|{'N/A' if index is None else index}|{task.state}|n1|{task.reason}|{job.name}|{job.comment}"
            for number, job in self.jobs.items()
            for index, task in job.tasks.items()
            if task.state not in OVER
        )

    def scancel(self, words: list[str]) -> str:
        for number in words:
            for task in self.jobs[number].tasks.values():
                if task.state not in OVER:
                    task.state = "CANCELLED"
        return ""

    def scontrol(self, words: list[str]) -> str:
        if words[:2] == ["show", "config"]:
            return f"MaxArraySize            = {self.max_array_size}"
        return f"JobId={words[2]}\n   StdOut={self.jobs[words[2]].log}"

    # ------------------------------------------------------------------------------------- time

    def step(self) -> list[str]:
        """Let time pass, and return the ids of the gates that run."""
        gates: list[str] = []
        for number, job in list(self.jobs.items()):
            if job.over:
                continue
            needed = [self.jobs[other] for other in job.after_success]
            ready = all(other.over for other in needed) and all(self.jobs[other].over for other in job.after)
            failed = any(other.over and not other.succeeded for other in needed)
            for index, task in job.tasks.items():
                if task.state == "PENDING" and failed:
                    task.state = "CANCELLED"  # --kill-on-invalid-dep
                elif task.state == "PENDING" and task.reason == "JobHoldMaxRequeue":
                    if self.random.random() < 0.3:  # an administrator releases it
                        task.reason = "Resources"
                elif task.state == "PENDING" and ready:
                    self.start(job, index, task)
                elif task.state in ("RUNNING", "COMPLETING"):
                    task.left -= 1
                    if task.left <= 0 and self.end(job, index, task):
                        gates.append(number)
        return gates

    def start(self, job: FakeJob, index: int | None, task: Task) -> None:
        task.state, task.left, task.reason = "RUNNING", self.random.randint(1, 3), "None"
        task.outcome = "well"
        if job.kind == "gate":
            task.outcome = "lost" if self.draw("gate lost") else "well"
            return
        key = self.key(job, index)
        assert key not in self.running, f"{key} runs twice"
        assert not self.done(key), f"{key} is trained twice"
        self.running.add(key)
        if job.kind == "incubate":
            assert self.done("pretrain"), f"{key} has started without a meta model"
        if job.kind == "finetune":
            assert self.done("pretrain"), "the meta model is missing"
            assert all(self.done(f"incubate/{module}") for module in self.modules), "a module is missing"
        for fault in ("crash", "requeue", "hold"):
            if self.draw(fault):
                task.outcome = fault
        if planned := self.outcomes.get(key):
            task.outcome = planned.pop(0)

    def end(self, job: FakeJob, index: int | None, task: Task) -> bool:
        """End a task, or its Epilog. Return whether a gate does its work now."""
        if task.state == "COMPLETING":
            task.state = "FAILED" if task.outcome in ("crash", "stop") else "COMPLETED"
            return False
        self.running.discard(self.key(job, index))
        if task.outcome == "requeue":
            task.state, task.reason = "PENDING", "BeginTime"
            return False
        if task.outcome == "hold":
            task.state, task.reason = "PENDING", "JobHoldMaxRequeue"
            return False
        if job.kind == "gate":
            if task.outcome == "lost":
                task.state = "FAILED"
            return task.outcome == "well"
        if task.outcome == "stop":
            self.write_checkpoint(self.key(job, index))
        if task.outcome == "well":
            self.finished.add(self.key(job, index))
        self.finish(task)
        return False

    def finish(self, task: Task) -> None:
        task.state, task.left = "COMPLETING", self.random.randint(1, 8) if self.draw("slow Epilog") else 0

    def write_checkpoint(self, key: str) -> None:
        phase, _, module = key.partition("/")
        checkpoints = self.run.phase(cast(Phase, phase), int(module) if module else None).checkpoints
        marker = checkpoints / f"step-{1 + len(list(checkpoints.glob('*'))):08d}" / "COMMITTED"
        marker.parent.mkdir(parents=True)
        marker.touch()

    def key(self, job: FakeJob, index: int | None) -> str:
        return job.kind if job.kind != "incubate" else f"incubate/{job.offset + (index or 0)}"

    def done(self, key: str) -> bool:
        return key in self.finished

    # ------------------------------------------------------------------------------------- a whole run

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace Slurm's programs and the artifacts of the phases in this process."""
        for module in (client, scheduler, submission_log):
            monkeypatch.setattr(module, "run_slurm_command", self.command)
        monkeypatch.setattr(scheduler, "_is_valid", lambda job, run: self.done(job.key))

    def complete(self, recipe: Recipe, graph: Sequence[Job]) -> int:
        """Submit a run and let time pass until it is done. Whenever nothing is in the queue, a user calls ``resume``.

        Returns:
            How often a user had to call it.
        """
        calls = 0
        for _ in range(5000):
            if all(self.done(job.key) for job in graph):
                return calls
            if self.waiting() == 0:
                calls += 1
                with suppress(BigincubateError):
                    scheduler.submit_missing_jobs(recipe, graph, self.run, say=lambda text: None)
            for number in self.step():
                task = self.jobs[number].tasks[None]
                try:
                    scheduler.submit_missing_jobs(recipe, graph, self.run, gate=number, say=lambda text: None)
                except SystemResourceError:
                    task.state, task.reason = "PENDING", "BeginTime"  # the gate requeues itself
                except ArtifactError:
                    task.state = "FAILED"
                else:
                    self.finish(task)
        raise AssertionError(f"the run is not done\n{self.squeue(['--array'])}")
