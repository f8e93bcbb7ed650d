"""Launcher for a run on this machine. Each phase runs in separate processes, one per rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import FrameType

from ..distributed.parent_death import adopt_orphans
from ..errors import Exit, format_os_error
from ..planning.job_graph import Job
from ..storage.run_directory import PhaseDir, RunDir
from .fork_server import COMMAND, ForkServers, can_fork
from .gpus import GPU_VARIABLE, choose_gpus, list_visible_gpus
from .progress import ProgressReporter
from .rank_group import RankGroup, StartProcess, start_process


@dataclass
class HelperJob:
    """Processes that assist the modules, one per rank, from the start of the first module to the end of the last one.

    Modules must also train without them, because they may fail to start or end early.

    Attributes:
        title: Name of the job in messages.
        log: Name of the log files in the run's ``modules/logs``, without suffix.
        command: Returns the command line for a given number of modules.
        environment: Environment variables of the helper processes.
        module_environment: Environment variables of the modules' processes.
        fallback: What modules do without the helper job, for messages.
        ranks: The processes; None before they are started.
    """

    title: str
    log: str
    command: Callable[[int], list[str]]
    environment: dict[str, str]
    module_environment: dict[str, str]
    fallback: str
    ranks: RankGroup | None = None

    def start(self, folder: Path, nproc: int, modules: int) -> None:
        """Start the processes.

        Args:
            folder: Folder of the log files.
            nproc: Number of processes.
            modules: Number of modules that are about to start.

        Raises:
            OSError: A process could not be started, or the folder could not be created.
        """
        logs = [folder / (f"{self.log}.{rank}.log" if rank else f"{self.log}.log") for rank in range(nproc)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment}
        self.ranks = RankGroup.start(self.command(modules), environment, logs)

    def stop(self) -> None:
        """Ask the processes to exit, if they were started."""
        if self.ranks is not None:
            self.ranks.stop()


def phase_environment(variables: Mapping[str, str], processes: int) -> dict[str, str]:
    """Return the environment variables of a phase.

    Args:
        variables: The environment variables of the run.
        processes: Number of processes that share the cores of this machine.
    """
    return {
        # divide the cores among the processes, so that they do not compete
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        # if another process is running, threads that spin while they wait make a step several times slower
        "OMP_WAIT_POLICY": "PASSIVE",
        **variables,
        "PYTHONUNBUFFERED": "1",
    }


@dataclass
class LocalRunner:
    """Runs a job graph. If a job fails, jobs that do not depend on it continue.

    Attributes:
        run: The run directory.
        jobs: Maximum number of phases that run in parallel.
        reporter: Prints progress.
        nproc: Number of ranks of each phase.
        helper: Processes that assist the modules, or None.
        estimate: Returns lines about the remaining time to print, given the running phases.
        running: The ranks of running jobs, by the key of the job.
        gpus: The GPUs of running jobs, by the key of the job.
        variables: The environment variables of the phases.
        servers: The fork servers that start the phases; ended at the end of the run.
        stop_requested: Whether a stop signal has arrived.
        stopping: Whether to start no more jobs, because of a signal or because a job was stopped.
        patience: Number of remaining retries of phases whose directory is still owned by a killed attempt.
    """

    run: RunDir
    jobs: int
    reporter: ProgressReporter
    nproc: int = 1
    helper: HelperJob | None = None
    estimate: Callable[[list[tuple[Job, PhaseDir]]], list[str]] = lambda running: []
    running: dict[str, RankGroup] = field(default_factory=dict)
    gpus: dict[str, list[str]] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    servers: ForkServers = field(default_factory=ForkServers)
    stop_requested: bool = False
    stopping: bool = False
    patience: int = 20

    def start_server(self, *, baseline: bool) -> None:
        """Start the fork server of the first phase, so that it imports while the run is being planned.

        With several GPUs, the variables of a phase depend on the GPUs that it gets, which are not known yet.

        Args:
            baseline: Whether the end-to-end baseline starts at the same time.
        """
        if len(list_visible_gpus()) < 2:
            self._find_starter(phase_environment(self.variables, min(self.jobs, 1 + baseline) * self.nproc))

    def execute(self, graph: list[Job]) -> Exit:
        """Run the jobs that are not done yet.

        Returns:
            The exit code of the first job that failed; otherwise 75 if the run was stopped, or 0.
        """
        with adopt_orphans() if can_fork(self.nproc, list_visible_gpus()) else nullcontext():
            return self._run_jobs(graph)

    def _run_jobs(self, graph: list[Job]) -> Exit:
        """Run the jobs that are not done yet, and return the exit code of :meth:`execute`."""
        done = {job.key for job in graph if self._phase_dir(job).result is not None}
        failed: dict[str, int] = {}
        waiting = [job for job in graph if job.key not in done]
        announced = False
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while waiting or self.running:
                if self.stop_requested:
                    if not announced:
                        self.reporter.say("stopping: each running phase writes a checkpoint first")
                        announced = True
                    self._stop_ranks()
                ready = self._ready_jobs(waiting, done)[: self.jobs - len(self.running)]
                if modules := sum(job.phase == "incubate" for job in ready):
                    self.start_helper(modules)
                for job in ready:
                    waiting.remove(job)
                    try:
                        # cores are divided by the number of jobs that may run in parallel, not of those that do, so
                        # that a resumed job has the same number of threads and computes the same bits
                        self._start_job(job, parallel=min(self.jobs, sum(other.needs == job.needs for other in graph)))
                    except OSError as error:
                        failed[job.key] = Exit.ENVIRONMENT
                        reason = format_os_error(error)
                        self.reporter.failed(job, Exit.ENVIRONMENT, reason, self._log_file(job, 0))
                if not waiting:
                    self.servers.close()
                if not self.running and not self._ready_jobs(waiting, done):
                    break  # the remaining jobs depend on a failed job, or the run is stopping
                self._pause()
                for job, ranks, code in self._pop_finished(graph):
                    if code == 0:
                        done.add(job.key)
                        self.reporter.done(job, self._phase_dir(job).result or {})
                    elif code == Exit.PREEMPTED or (self.stopping and code == -signal.SIGTERM):
                        self.stopping = True  # -SIGTERM: the rank was stopped before it installed its signal handler
                    elif code == Exit.LOCKED and self.patience:
                        self.patience -= 1
                        time.sleep(1)
                        waiting.append(job)
                    else:
                        failed[job.key] = code
                        self.reporter.failed(job, code, ranks.reason, ranks.log)
                self.servers.reap_orphans()
                self.check_helper(waiting)
                running = [(job, self._phase_dir(job)) for job in graph if job.key in self.running]
                self.reporter.update(running)
                for line in self.estimate(running):
                    self.reporter.say(line)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for ranks in self.running.values():  # empty unless the loop raised an error
                ranks.stop()
            if self.helper is not None and self.helper.ranks is not None:
                self.helper.ranks.shut_down()
            self.servers.kill()
        if failed:
            return Exit(next(iter(failed.values()))) if next(iter(failed.values())) in set(Exit) else Exit.ENVIRONMENT
        return Exit.PREEMPTED if self.stopping else Exit.DONE

    def _ready_jobs(self, waiting: list[Job], done: set[str]) -> list[Job]:
        """Return the waiting jobs that can start now."""
        return [job for job in waiting if done.issuperset(job.needs)] if not self.stopping else []

    def _start_job(self, job: Job, parallel: int) -> None:
        """Start the ranks of a job.

        Args:
            job: The job.
            parallel: Number of jobs that share the cores of this machine.
        """
        logs = [self._log_file(job, rank) for rank in range(self.nproc)]
        command = [*COMMAND, "train", str(self.run.recipe_file)]
        command += ["--run-dir", str(self.run.path), "--phase", job.phase]
        command += ["--module", str(job.module)] if job.module is not None else []
        environment = phase_environment(self.variables, parallel * self.nproc)
        if self.helper is not None and job.phase == "incubate":
            environment |= self.helper.module_environment
        visible = list_visible_gpus()
        if len(visible) > 1:  # jobs that run in parallel get different GPUs
            self.gpus[job.key] = choose_gpus(visible, chain.from_iterable(self.gpus.values()), self.nproc)
            environment[GPU_VARIABLE] = ",".join(self.gpus[job.key])
        self.running[job.key] = RankGroup.start(command, environment, logs, self._find_starter(environment))
        self.reporter.started(job)

    def _find_starter(self, environment: Mapping[str, str]) -> StartProcess:
        """Return the function that starts a process with these environment variables."""
        if can_fork(self.nproc, list_visible_gpus()):
            with suppress(OSError):  # a process without a server may still start, because it needs less memory
                return self.servers.find(environment).start_process
        return start_process

    def start_helper(self, modules: int) -> None:
        """Start the helper job before the first modules. If it cannot be started, modules run without it."""
        helper = self.helper
        if helper is None or helper.ranks is not None:
            return
        try:
            helper.start(self.run.path / "modules" / "logs", self.nproc, modules)
        except OSError as error:
            self.helper = None
            reason = format_os_error(error)
            self.reporter.say(f"{helper.title}: could not be started ({reason}); {helper.fallback}")

    def check_helper(self, waiting: list[Job]) -> None:
        """Stop the helper job once no module needs it, and report it if it ended early."""
        if self.helper is None or (ranks := self.helper.ranks) is None:
            return
        if not any(key.startswith("incubate/") for key in (*self.running, *(job.key for job in waiting))):
            ranks.stop()
        if ranks.poll() is not None and not ranks.stop_requested:
            self.reporter.say(f"{self.helper.title}: {ranks.reason}; {self.helper.fallback}")
            ranks.stop()  # sets stop_requested, so that it is reported only once

    def _pop_finished(self, graph: list[Job]) -> Iterator[tuple[Job, RankGroup, int]]:
        """Remove the jobs that have ended from ``running``, and yield each with its ranks and exit code."""
        for job in graph:
            ranks = self.running.get(job.key)
            if ranks is not None and (code := ranks.poll()) is not None:
                del self.running[job.key]
                self.gpus.pop(job.key, None)
                yield job, ranks, code

    def _phase_dir(self, job: Job) -> PhaseDir:
        """Return the folder of a job's phase."""
        return self.run.phase(job.phase, job.module)

    def _log_file(self, job: Job, rank: int) -> Path:
        """Return the log file of a rank of a job."""
        return self._phase_dir(job).path / "logs" / (f"train.{rank}.log" if rank else "train.log")

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        """Note a stop signal. The loop of :meth:`execute` stops the ranks, so that nothing is interrupted midway."""
        self.stop_requested = self.stopping = True  # printing is for the loop: a line may be half printed right now

    def _pause(self) -> None:
        """Wait for a fifth of a second, or until a job has ended or a stop signal arrives."""
        before = self.stop_requested
        for _ in range(10):
            if self.stop_requested == before and all(ranks.poll() is None for ranks in self.running.values()):
                time.sleep(0.02)

    def _stop_ranks(self) -> None:
        """Ask all processes to stop, and end the servers, so that processes that do not exist yet never start."""
        for ranks in self.running.values():
            ranks.stop()
        if self.helper is not None:
            self.helper.stop()
        self.servers.kill()
