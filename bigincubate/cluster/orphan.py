"""A phase started by the local runner does not outlive it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "BIGINCUBATE_PARENT"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """When the local runner is killed, be asked to stop as by Slurm: checkpoint, then leave. Linux only; elsewhere the
    phase runs to its end, and the next run finds it done."""
    parent = os.environ.pop(PARENT, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # gone before we asked
        os.kill(os.getpid(), signal.SIGTERM)
