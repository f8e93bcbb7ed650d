"""Stop a process when the process that started it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT_VARIABLE = "BIGINCUBATE_PARENT"  # environment variable with the pid of the process to depend on
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def stop_with_parent() -> None:
    """Have SIGTERM sent to this process when the parent process named by ``PARENT_VARIABLE`` ends.

    A training process then writes a checkpoint and exits, as when Slurm asks it to stop. Only Linux supports this;
    elsewhere the phase runs to its end, and the next run finds it done.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before the request
        os.kill(os.getpid(), signal.SIGTERM)
