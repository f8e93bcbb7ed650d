"""Files that may not be read, also if root runs the tests, and files that cannot grow, as on a full disk."""

from __future__ import annotations

import builtins
import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def deny(patch: pytest.MonkeyPatch, path: Path, number: int = errno.EACCES) -> None:
    """Refuse what a user without permissions cannot do: open a file, or read a folder and use what is in it.

    Args:
        patch: Undoes it.
        path: The file or folder.
        number: The number of the error.
    """

    def refuse(owner: Any, name: str, *, itself: bool) -> None:
        original = getattr(owner, name)

        def call(place: Any = ".", *arguments: Any, **options: Any) -> Any:
            if not isinstance(place, int) and (path in Path(place).parents or (itself and Path(place) == path)):
                raise OSError(number, os.strerror(number), str(place))
            return original(place, *arguments, **options)

        patch.setattr(owner, name, call)

    for owner, name in ((builtins, "open"), (Path, "open"), (os, "open"), (os, "listdir"), (os, "scandir")):
        refuse(owner, name, itself=True)
    for owner, name in ((os, "stat"), (os, "lstat")):
        refuse(owner, name, itself=False)


def solution_for(path: Path, denied: Path) -> str:
    """Return the advice for a path if access to ``denied``, the path itself or a folder that contains it, is denied."""
    permissions = "its permissions" if path == denied else f"the permissions of {denied}"
    return f"change {permissions}, then run the same command again"


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size in bytes. Writing more fails, much as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
