"""Launcher for a whole run on this machine: each phase has processes of its own, one per rank."""

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
    """Runs a job graph. A job that fails does not stop the jobs that do not need it.

    Attributes:
        run: The run directory.
        jobs: Maximum number of phases that run in parallel.
        reporter: Prints progress.
        nproc: Number of ranks of each phase.
        co_train: Whether modules share one loader; all of them must then run at the same time.
        running: The ranks of running jobs, by the key of the job.
        stopping: Whether the run has been asked to stop.
        patience: How many more times a phase may find its directory owned by a previous attempt that was killed.
        feeder: The processes of the shared loader.
        place: The address of the shared loader.
    """

    run: RunDir
    jobs: int
    reporter: Reporter
    nproc: int = 1
    co_train: bool = False
    running: dict[str, Ranks] = field(default_factory=dict)
    stopping: bool = False
    patience: int = 20
    feeder: Ranks | None = None
    place: str = field(default_factory=lambda: secrets.token_hex(16))

    def execute(self, graph: list[Job]) -> Exit:
        """Run the jobs that are not done yet.

        Returns:
            0, or 75 after a stop, or the exit code of the first job that failed.
        """
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
                        # cores are divided by the jobs that may run in parallel, not by those that do: a resumed job
                        # then has as many threads as before and computes the same bits
                        self.start(job, parallel=min(self.jobs, sum(other.needs == job.needs for other in graph)))
                    except OSError as error:
                        failed[job.key] = Exit.ENVIRONMENT
                        reason = f"{error.filename}: {error.strerror}"
                        self.reporter.failed(job, Exit.ENVIRONMENT, reason, self.log(job, 0))
                if not self.running and not self.ready(waiting, done):
                    break  # the remaining jobs need one that failed, or the run is stopping
                for job, ranks, code in self.finished(graph):
                    if code == 0:
                        done.add(job.key)
                        self.reporter.done(job, self.folder(job).result or {})
                    elif code == Exit.PREEMPTED or (self.stopping and code == -signal.SIGTERM):
                        self.stopping = True  # -SIGTERM: stopped before it could install its handler
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
            for ranks in self.running.values():  # some are left only after an error in this loop
                ranks.stop()
            if self.feeder is not None:
                self.feeder.end()
        if failed:
            return Exit(next(iter(failed.values()))) if next(iter(failed.values())) in set(Exit) else Exit.ENVIRONMENT
        return Exit.PREEMPTED if self.stopping else Exit.DONE

    def ready(self, waiting: list[Job], done: set[str]) -> list[Job]:
        """Return the waiting jobs that can start now."""
        return [job for job in waiting if done.issuperset(job.needs)] if not self.stopping else []

    def start(self, job: Job, parallel: int) -> None:
        """Start the ranks of a job.

        Args:
            job: The job.
            parallel: Number of jobs that share the cores of this machine.
        """
        logs = [self.log(job, rank) for rank in range(self.nproc)]
        logs[0].parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bigincubate", "train", str(self.run.recipe_file)]
        command += ["--run-dir", str(self.run.path), "--phase", job.phase]
        command += ["--module", str(job.module)] if job.module is not None else []
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if self.co_train and job.phase == "incubate":
            environment[FEED] = self.place
        # cores are divided among processes, so that they do not compete
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (parallel * self.nproc))))
        # threads that spin while they wait slow a step down several times when another process is running
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self.running[job.key] = Ranks(command, environment, logs)
        if self.stopping:  # since the ranks were being started
            self.running[job.key].stop()
        self.reporter.started(job)

    def feed(self, readers: int) -> None:
        """Start the shared loader of the modules, one process per rank. If that fails, each module loads its own data.

        Args:
            readers: Number of modules that will connect.
        """
        folder = self.run.path / "modules" / "logs"
        logs = [folder / (f"feed.{rank}.log" if rank else "feed.log") for rank in range(self.nproc)]
        command = [sys.executable, "-m", "bigincubate", "feed", str(self.run.recipe_file)]
        command += ["--run-dir", str(self.run.path), "--readers", str(readers)]
        # one thread, as in a loader's worker, and no GPU
        own = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", FEED: self.place}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.feeder = Ranks(command, {**os.environ, **own}, logs)
        except OSError as error:
            self.co_train = False
            self.reporter.say(f"no shared loader ({error.filename}: {error.strerror}); each module loads its own data")
            return
        if self.stopping:  # since it was being started
            self.feeder.stop()

    def tend(self, waiting: list[Job]) -> None:
        """Stop the shared loader when no module needs it any more; report it if it ended before."""
        feeder = self.feeder
        if feeder is None:
            return
        if not any(key.startswith("incubate/") for key in (*self.running, *(job.key for job in waiting))):
            feeder.stop()
        if feeder.poll() is not None and not feeder.asked:
            self.reporter.say(f"the shared loader ended: {feeder.reason}; each module now loads its own data")
            feeder.stop()  # report it once

    def finished(self, graph: list[Job]) -> Iterator[tuple[Job, Ranks, int]]:
        """Remove the jobs that have ended from ``running``, and yield each with its ranks and exit code."""
        for job in graph:
            ranks = self.running.get(job.key)
            if ranks is not None and (code := ranks.poll()) is not None:
                del self.running[job.key]
                yield job, ranks, code

    def folder(self, job: Job) -> PhaseDir:
        """Return the folder of a job's phase."""
        return self.run.phase(job.phase, job.module)

    def log(self, job: Job, rank: int) -> Path:
        """Return the log file of a rank of a job."""
        return self.folder(job).path / "logs" / (f"train.{rank}.log" if rank else "train.log")

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if not self.stopping:
            self.stopping = True
            self.reporter.say("stopping: each running phase writes a checkpoint first")
            for ranks in self.running.values():
                ranks.stop()
            if self.feeder is not None:
                self.feeder.stop()
