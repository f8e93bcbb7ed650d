"""A whole run on this machine: each phase has its own processes, one a rank; at most ``jobs`` phases at a time."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from .. import FEED
from ..errors import Exit
from ..planning.job_graph import Job
from ..rundir import PhaseDir, RunDir
from .progress import Reporter
from .ranks import Ranks


@dataclass
class LocalRunner:
    """Runs a job graph. A failing job never stops those that do not need it."""

    run: RunDir
    jobs: int
    reporter: Reporter
    nproc: int = 1  # ranks of each phase
    co_train: bool = False  # modules share one loader; all of them must run at the same time
    running: dict[str, Ranks] = field(default_factory=dict)
    stopping: bool = False
    patience: int = 20  # times that a phase may find its directory owned: by the ghost of a run that was killed
    feeder: Ranks | None = None  # makes the batches of co-trained modules
    place: str = field(default_factory=lambda: secrets.token_hex(16))  # where it is found

    def execute(self, graph: list[Job]) -> Exit:
        """Run what is not done yet. Gives 0, 75 after a stop, or the exit code of the first job that failed."""
        done = {job.key for job in graph if self.folder(job).result is not None}
        failed: dict[str, int] = {}
        waiting = [job for job in graph if job.key not in done]
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while waiting or self.running:
                ready = self.ready(waiting, done)[: self.jobs - len(self.running)]
                if self.co_train and self.feeder is None and any(job.phase == "incubate" for job in ready):
                    self.feed(readers=sum(job.phase == "incubate" for job in ready))
                for job in ready:
                    waiting.remove(job)
                    try:
                        # cores are shared by what may run beside, not by what does: a resume computes the same bits
                        self.start(job, beside=min(self.jobs, sum(other.needs == job.needs for other in graph)))
                    except OSError as error:
                        failed[job.key] = Exit.ENVIRONMENT
                        reason = f"{error.filename}: {error.strerror}"
                        self.reporter.failed(job, Exit.ENVIRONMENT, reason, self.log(job, 0))
                if not self.running and not self.ready(waiting, done):
                    break  # what waits needs something that failed, or we were asked to stop
                for job, ranks, code in self.finished(graph):
                    if code == 0:
                        done.add(job.key)
                        self.reporter.done(job, self.folder(job).result or {})
                    elif code == Exit.PREEMPTED or (self.stopping and code == -signal.SIGTERM):
                        self.stopping = True  # the second: before it had begun
                    elif code == Exit.LOCKED and self.patience:
                        self.patience -= 1
                        time.sleep(1)
                        waiting.append(job)
                    else:
                        failed[job.key] = code
                        self.reporter.failed(job, code, ranks.reason, ranks.log)
                self.tend(waiting)
                self.reporter.update([(job, self.folder(job)) for job in graph if job.key in self.running])
                time.sleep(0.2)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for ranks in self.running.values():  # only after an error of our own
                ranks.stop()
            if self.feeder is not None:
                self.feeder.end()
        if failed:
            return Exit(next(iter(failed.values()))) if next(iter(failed.values())) in set(Exit) else Exit.ENVIRONMENT
        return Exit.PREEMPTED if self.stopping else Exit.DONE

    def ready(self, waiting: list[Job], done: set[str]) -> list[Job]:
        return [job for job in waiting if done.issuperset(job.needs)] if not self.stopping else []

    def start(self, job: Job, beside: int) -> None:
        logs = [self.log(job, rank) for rank in range(self.nproc)]
        logs[0].parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bigincubate", "train", str(self.run.recipe_file)]
        command += ["--run-dir", str(self.run.path), "--phase", job.phase]
        command += ["--module", str(job.module)] if job.module is not None else []
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if self.co_train and job.phase == "incubate":
            environment[FEED] = self.place
        # the cores are shared out, so that processes do not fight over them
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (beside * self.nproc))))
        # threads that spin while they wait make a step several times as long as soon as anything else runs
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self.running[job.key] = Ranks(command, environment, logs)
        if self.stopping:  # asked to while they were started
            self.running[job.key].stop()
        self.reporter.started(job)

    def feed(self, readers: int) -> None:
        """Start the loader that modules share, a process for each rank of theirs. Where that fails, each has its own.

        Args:
            readers: how many modules will come.
        """
        folder = self.run.path / "modules" / "logs"
        logs = [folder / (f"feed.{rank}.log" if rank else "feed.log") for rank in range(self.nproc)]
        command = [sys.executable, "-m", "bigincubate", "feed", str(self.run.recipe_file)]
        command += ["--run-dir", str(self.run.path), "--readers", str(readers)]
        # it computes as a loader's worker does, and has nothing to do with a GPU
        own = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", FEED: self.place}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.feeder = Ranks(command, {**os.environ, **own}, logs)
        except OSError as error:
            self.co_train = False
            self.reporter.say(f"no shared loader ({error.filename}: {error.strerror}); each module has its own")
            return
        if self.stopping:  # asked to while it was started
            self.feeder.stop()

    def tend(self, waiting: list[Job]) -> None:
        """Let the shared loader leave once no module needs it; say so where it left before."""
        feeder = self.feeder
        if feeder is None:
            return
        if not any(key.startswith("incubate/") for key in (*self.running, *(job.key for job in waiting))):
            feeder.stop()
        if feeder.poll() is not None and not feeder.asked:
            self.reporter.say(f"the shared loader ended: {feeder.reason}; modules go on, each with its own")
            feeder.stop()  # nothing more to say

    def finished(self, graph: list[Job]) -> Iterator[tuple[Job, Ranks, int]]:
        for job in graph:
            ranks = self.running.get(job.key)
            if ranks is not None and (code := ranks.poll()) is not None:
                del self.running[job.key]
                yield job, ranks, code

    def folder(self, job: Job) -> PhaseDir:
        return self.run.phase(job.phase, job.module)

    def log(self, job: Job, rank: int) -> Path:
        return self.folder(job).path / "logs" / (f"train.{rank}.log" if rank else "train.log")

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if not self.stopping:
            self.stopping = True
            self.reporter.say("stopping: each running phase writes a checkpoint first")
            for ranks in self.running.values():
                ranks.stop()
            if self.feeder is not None:
                self.feeder.stop()
