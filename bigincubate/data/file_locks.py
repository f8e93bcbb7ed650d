"""File locks that the operating system releases when the process that holds them ends, and what replaces them."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import SystemResourceError

# what a file system answers that does not support a call: Lustre without the option `flock`, NFS without lockd, FUSE
UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EPERM, errno.ENOSYS, errno.EINVAL}

logger = logging.getLogger(__name__)

LOCK_SECONDS = 1800.0  # default limit for waiting for a lock


@contextmanager
def file_lock(file: Path, limit: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold an exclusive lock on ``file`` while the block runs. Processes forked by the block hold it too.

    Args:
        file: Created if it is missing.
        limit: Seconds to wait for the lock.

    Raises:
        SystemResourceError: Another process has held the lock all the time.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        wait_for_lock(descriptor, fcntl.LOCK_EX, file, limit)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def folder_lock(folder: Path, limit: float = LOCK_SECONDS) -> Iterator[None]:
    """Let only one process of all nodes that share a disk write to ``folder`` while the block runs; the others wait.

    This is a file lock. On a file system without file locks, it is a lease, which needs none.

    Args:
        folder: The folder, which may be missing. The files of the lock are next to it.
        limit: Seconds to wait for the lock.

    Raises:
        SystemResourceError: Another process has held the lock all the time.
        LockedError: The same, on a file system without file locks.
    """
    from ..storage.lease import acquire_lease_when_free

    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder.with_name(f".{folder.name}.lock"), limit))
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            logger.warning("%s: the file system has no file locks; using a lease instead", folder.parent)
            stack.enter_context(acquire_lease_when_free(folder.with_name(f".{folder.name}.lease"), limit=limit))
        yield


def wait_for_lock(descriptor: int, kind: int, file: Path, limit: float = LOCK_SECONDS) -> None:
    """Lock an open file. The lock of a process that has ended is free, but not that of a suspended process.

    Args:
        descriptor: The open file.
        kind: ``fcntl.LOCK_EX`` or ``fcntl.LOCK_SH``.
        file: Its path, for the message.
        limit: Seconds to wait.

    Raises:
        SystemResourceError: Another process has held the lock all the time.
    """
    deadline, pause = time.monotonic() + limit, 0.001
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        if time.monotonic() > deadline:
            raise SystemResourceError(
                f"{file} was locked by another process for {limit:g} s; find it with: fuser {file}; it may be suspended"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def runtime_dir() -> Path:
    """Return this user's folder for locks on this node; create it if it is missing.

    Raises:
        SystemResourceError: If a folder of that name belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"bigincubate-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise SystemResourceError(f"{folder} belongs to another user; set TMPDIR to a folder that you own")
    return folder
