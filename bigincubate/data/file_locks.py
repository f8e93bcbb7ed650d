"""File locks that the operating system releases when the process that holds them ends."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SystemResourceError


@contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``file`` while the block runs. Processes forked by the block hold it too.

    Args:
        file: Created if it is missing.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
