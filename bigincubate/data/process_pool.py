"""Run a function in several processes that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

from ..errors import SystemResourceError

CHUNK_SECONDS = 3600.0  # time without a finished chunk after which the processes count as stuck
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def run_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], jobs: int, what: str, *, always_fork: bool = False
) -> Iterator[Iterator[Result]]:
    """Call a function with each item in this process, or in ``jobs`` other processes.

    Args:
        function: A function that can be pickled.
        items: The items.
        jobs: Number of processes.
        what: What the function writes, for the message if the processes are stuck.
        always_fork: Whether to use other processes even for a single item or job.

    Yields:
        An iterator over the results, in the order in which they arrive.
    """
    if not always_fork and (jobs <= 1 or len(items) <= 1):
        yield map(function, items)
        return
    from ..compat import streaming_package  # noqa: F401  import it once, before the processes are forked

    pool = ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_exit_with_parent,
        initargs=(os.getpid(),),
    )
    try:
        futures = [pool.submit(function, item) for item in items]
        yield _results(pool, futures, what)
    finally:
        pool.shutdown(cancel_futures=True)


def _results(pool: ProcessPoolExecutor, futures: Iterable[Future[Result]], what: str) -> Iterator[Result]:
    """Yield the results in the order in which they arrive."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=CHUNK_SECONDS, return_when=FIRST_COMPLETED)
        if not done:
            for process in pool._processes.values():
                process.kill()  # otherwise the shutdown of the pool would wait for them
            raise SystemResourceError(
                f"no process wrote any {what} for {CHUNK_SECONDS:g} s: check that the storage responds, and that no"
                " process is suspended; run the same command again to resume"
            )
        yield from (future.result() for future in done)


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent process has ended, even by SIGKILL, because this process also holds the parent's lock."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent process too, which stops this one

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
