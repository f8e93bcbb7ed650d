"""Unique names for the shared memory of data sets on a node."""

from __future__ import annotations

import fcntl
import secrets
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import IO, NamedTuple

from .file_locks import file_lock, runtime_dir


class MemoryClaim(NamedTuple):
    """A number for naming shared memory.

    Attributes:
        prefix: The number.
        release: Gives it back, and removes what is left of the shared memory.
    """

    prefix: int
    release: Callable[[], None]


def claim_memory_prefix() -> MemoryClaim:
    """Claim a number for naming shared memory that no other open data set of this user on this node has.

    A file ``<number>.claim`` is locked until the claim is released and the workers have ended. If its lock is free, the
    owner has ended, and its shared memory is removed. (streaming's own cleanup also removes that of running processes.)

    Raises:
        SystemResourceError: If the folder for locks belongs to another user.
    """
    _start_resource_tracker()
    folder = runtime_dir()
    with file_lock(folder / "claims"):
        for file in folder.glob("*.claim"):
            # BlockingIOError: the owner is running; FileNotFoundError: the owner has just removed its claim
            with suppress(BlockingIOError, FileNotFoundError), file.open() as other:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_memory(int(file.stem))
        while True:
            prefix = secrets.randbelow(10**9)
            # a signal during open() can also cause FileExistsError: Python calls open() again after it created the file
            with suppress(FileExistsError):
                claim = (folder / f"{prefix}.claim").open("x")  # left open, to keep the lock
                break
        fcntl.flock(claim, fcntl.LOCK_EX)
    return MemoryClaim(prefix, partial(_release_claim, prefix, claim))


def _start_resource_tracker() -> None:
    """Start multiprocessing's process that tracks shared memory, so that Slurm's signals do not end it.

    Slurm sends the signals that stop training to every process of a job step. The tracker ignores SIGINT and SIGTERM.
    """
    signals = {signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the tracker inherits the mask
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _release_claim(prefix: int, claim: IO[str]) -> None:
    _remove_memory(prefix)
    claim.close()


def _remove_memory(prefix: int) -> None:
    """Remove the shared memory, the locks and the claim of a data set."""
    for file in (
        *Path("/dev/shm").glob(f"{prefix:06}_*"),
        *Path(tempfile.gettempdir()).glob(f"{prefix:06}_*_filelock"),
        *runtime_dir().glob(f"{prefix}-*.lock"),
        runtime_dir() / f"{prefix}.claim",
    ):
        file.unlink(missing_ok=True)
