"""End a process without tearing down its interpreter, which takes a second once torch is imported."""

from __future__ import annotations

import atexit
import sys
from contextlib import suppress

exit_code: int | None = None  # of the command; None: tear down the interpreter as usual


def skip_teardown() -> None:
    """Skip the teardown when the interpreter ends, if :data:`exit_code` is set by then.

    Must be called before anything else registers an exit handler, because handlers run in reverse order. Exit handlers
    of Python and C still run, because profilers need them to write their files; only modules and objects are not
    removed.
    """
    atexit.register(_exit)


def _exit() -> None:
    if exit_code is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # the stream is closed or None
            stream.flush()
    import ctypes

    ctypes.PyDLL(None).exit(exit_code)  # PyDLL keeps the interpreter's lock, so that no other thread runs Python code
