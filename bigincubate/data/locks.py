"""Locks that die with their holder, in files."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import EnvironmentFault


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``file``, which is created if need be; processes forked meanwhile hold it too."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def runtime_dir() -> Path:
    """This user's folder for locks on this node.

    Raises:
        EnvironmentFault: somebody else owns a folder of that name.
    """
    folder = Path(tempfile.gettempdir()) / f"bigincubate-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise EnvironmentFault(f"{folder} belongs to somebody else: set TMPDIR to a folder of your own")
    return folder
