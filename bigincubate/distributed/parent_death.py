"""Stop a process when the process that started it ends, and let a process adopt its orphaned descendants."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PARENT_VARIABLE = "BIGINCUBATE_PARENT"  # environment variable with the pid of the parent process
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 1, 36, 37  # linux/prctl.h


def stop_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when the parent process in ``PARENT_VARIABLE`` ends.

    A training process then writes a checkpoint and exits, as when Slurm stops it. Only Linux supports this; on other
    systems the phase continues until it is done.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # the parent ended before the request
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def adopt_orphans() -> Iterator[None]:
    """Make descendants of this process its children when their own parents end, while the block runs. Needs Linux."""
    libc, before = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, before.value)
