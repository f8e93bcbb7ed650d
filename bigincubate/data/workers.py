"""Worker processes of a data loader: how they end, and what is reported when one of them ends early or is stuck."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from ..compat.torch import report_lost_batches
from ..errors import SystemResourceError

TIMEOUT_SECONDS = 1800.0  # time without a batch after which the workers count as stuck
PREFETCH_FACTOR = 2  # batches that a worker loads ahead; torch's default
MAX_EVAL_ROWS = 256  # rows of an evaluation batch of `EvalStream`, at most
SHARED_MEMORY = Path("/dev/shm")  # workers hand over batches through files in this folder
REMEDY = "give it more space (such as docker run --shm-size=8g), or lower data.workers or train.batch_size"
MEMORY = "the memory of the machine or of the job may be full: lower data.workers, or ask for more memory"
LOG_OR_MEMORY = f"the log above may have its message, or {MEMORY}"
RESUME = "run the same command again to resume"


def initialize_worker(worker: int) -> None:
    """Prepare a worker process: only the main process stops it, and a batch that it cannot hand over is reported.

    Args:
        worker: Index of the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C and stops its workers
    # Slurm signals every process of a job step, but the main process needs its workers until it has saved a checkpoint
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_if_parent_asks, daemon=True).start()
    report_lost_batches(_describe_lost_batch)


def _exit_if_parent_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def limit_wait(processes: Callable[[], Iterable[BaseProcess]]) -> Iterator[None]:
    """Stop waiting for a batch after `TIMEOUT_SECONDS`. No effect outside the main thread.

    torch's own limit is not enough: to receive a batch, the main process also reads from a socket of the worker.

    Args:
        processes: Returns the workers, which are killed then: the exit of this process waits for them.

    Raises:
        SystemResourceError: The block took longer, or a worker ended while it sent a batch.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop_waiting(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report the workers that are killed here
        for process in processes():
            process.kill()
        raise SystemResourceError(
            f"no batch from the loader workers for {TIMEOUT_SECONDS:g} s: check that the storage of the data responds,"
            f" and that no worker is suspended; {RESUME}"
        )

    before = signal.signal(signal.SIGALRM, stop_waiting)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_SECONDS)
    try:
        yield
    except (EOFError, ConnectionError, FileNotFoundError) as error:  # of the socket of a worker that has just ended
        if "DataLoader worker" in str(error):  # an error that the worker has raised and reported
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch may not have reported the worker yet
        raise SystemResourceError(f"a loader worker was killed or ended early; {LOG_OR_MEMORY}; {RESUME}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _describe_lost_batch(error: Exception) -> SystemResourceError:
    """Return the error to raise in the main process if a worker could not hand over a batch."""
    text = str(error).strip()
    # torch 2.11 names a wrong reason after "unable to allocate shared memory"
    if any(part in text for part in ("No space left", "Cannot allocate memory", "unable to allocate shared memory")):
        free = _format_bytes(shutil.disk_usage(SHARED_MEMORY).free)
        return SystemResourceError(f"{SHARED_MEMORY} is full ({free} free): {REMEDY}; {RESUME}")
    hint = "raise the limit of open files (ulimit -n)" if "Too many open files" in text else "try data.workers = 0"
    return SystemResourceError(f"a loader worker could not hand over a batch: {text}; {hint}; {RESUME}")


def check_shared_memory(workers: int, batch_bytes: int, rows: int, free: int) -> None:
    """Check that the batches that the workers hold at the same time fit in shared memory.

    Counted are the batches of training, which are loaded ahead also while a model is evaluated, and of an evaluation.

    Args:
        workers: Number of workers of each loader of this rank.
        batch_bytes: Size of a training batch of this rank.
        rows: Number of rows of that batch.
        free: Free bytes before the workers were started.

    Raises:
        SystemResourceError: They do not fit.
    """
    batches = workers * PREFETCH_FACTOR + 1
    needed = batches * batch_bytes * (rows + min(rows, MAX_EVAL_ROWS)) // max(1, rows)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    total = shutil.disk_usage(SHARED_MEMORY).total
    if needed > free or needed * ranks > total:
        space = f"{_format_bytes(free)} free" if needed > free else f"{_format_bytes(total)} for {ranks} ranks"
        raise SystemResourceError(
            f"{SHARED_MEMORY} is too small: {workers} loader workers hold up to {2 * batches} batches of"
            f" {_format_bytes(batch_bytes)}, {_format_bytes(needed)} in total, but it has {space}: {REMEDY}"
        )


def free_shared_memory() -> int:
    """Return the number of free bytes of shared memory."""
    return shutil.disk_usage(SHARED_MEMORY).free


def _format_bytes(size: int) -> str:
    return f"{size / 2**20:.3g} MiB" if size >= 2**20 else f"{size / 2**10:.3g} KiB"


@contextmanager
def explain_worker_failures() -> Iterator[None]:
    """Raise torch's errors about loader workers as errors of this package while the block runs.

    torch raises them in the main thread at any moment, when the worker ends.

    Raises:
        SystemResourceError: A worker has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if (text := describe_worker_failure(str(error))) is None:
            raise
        raise SystemResourceError(text) from error


def describe_worker_failure(text: str) -> str | None:
    """Return one line about a failed worker for the text of an error of torch, or None for another error."""
    found = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", text, re.DOTALL)
    if found is None:
        return None
    who, how = f"a loader worker (process {found[1]})", found[2]
    if "Bus error" in how:
        return f"{who} was ended by a bus error, because {SHARED_MEMORY} is full: {REMEDY}; {RESUME}"
    if killed := re.match(r"is killed by signal: ([^.]+?)\.? *(\.|$)", how):
        cause = f"; {MEMORY}" if killed[1] == "Killed" else ""
        return f"{who} was ended by a signal ({killed[1]}){cause}; {RESUME}"
    if code := re.match(r"exited unexpectedly with exit code (-?\d+)", how):
        return f"{who} ended with exit code {code[1]}; the log above may have its message; {RESUME}"
    return f"{who} was killed or ended early; {LOG_OR_MEMORY}; {RESUME}"
