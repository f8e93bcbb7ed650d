"""End a process without tearing down its interpreter, which takes a second once torch is imported."""

from __future__ import annotations

import atexit
import sys
from contextlib import suppress

exit_code: int | None = None  # of the command; None: the interpreter ends as usual


def skip_teardown() -> None:
    """Skip the teardown when the interpreter ends, if :data:`exit_code` is set by then.

    Must be called before anything else registers an exit handler, because handlers run in reverse order. Exit handlers
    of Python and C run as usual, which profilers need to write their files; only modules and objects are not removed.
    """
    atexit.register(_exit)


def _exit() -> None:
    if exit_code is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # it is closed
            stream.flush()
    import ctypes

    ctypes.PyDLL(None).exit(exit_code)  # holds the interpreter's lock, so that no other thread runs Python code
