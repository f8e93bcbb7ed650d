"""File locks that the operating system releases when the process that holds them ends, and what replaces them."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import LockedError, SystemResourceError

# what a file system answers that does not support a call: Lustre without the option `flock`, NFS without lockd, FUSE
UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EPERM, errno.ENOSYS, errno.EINVAL}

logger = logging.getLogger(__name__)


@contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``file`` while the block runs. Processes forked by the block hold it too.

    Args:
        file: Created if it is missing.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Let only one process of all nodes that share a disk write to ``folder`` while the block runs; the others wait.

    This is a file lock. On a file system without file locks, it is a lease, which needs none.

    Args:
        folder: The folder, which may be missing. The files of the lock are beside it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder.with_name(f".{folder.name}.lock")))
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            logger.warning("%s: the file system has no file locks; using a lease instead", folder.parent)
            stack.enter_context(_waiting_lease(folder.with_name(f".{folder.name}.lease")))
        yield


@contextmanager
def _waiting_lease(folder: Path) -> Iterator[None]:
    from ..distributed.process_group import DistributedContext
    from ..storage.lease import acquire_lease

    announced = False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(acquire_lease(folder, DistributedContext()))
                break
            except LockedError as error:
                if not announced:
                    logger.warning("waiting: %s", error)
                announced = True
                time.sleep(1)
        yield


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
