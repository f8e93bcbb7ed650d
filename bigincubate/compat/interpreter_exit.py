"""End a process without tearing down its interpreter, which takes a second once torch is imported."""

from __future__ import annotations

import atexit
import gc
import io
import os
from contextlib import suppress

FILES = {io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom}  # the classes that buffer output
# variables that add a library, such as a profiler, to a process; it may write its files in an exit handler of C
ADDED_LIBRARIES = ("LD_PRELOAD", "LD_AUDIT", "CUDA_INJECTION64_PATH", "HSA_TOOLS_LIB", "ROCP_TOOL_LIBRARIES")
exit_code: int | None = None  # of the command; None: tear down the interpreter as usual
is_forked = False  # whether this process was forked, and so has the exit handlers and C++ objects of another process
_frozen_files: list[io.IOBase] = []  # open files that the garbage collector no longer visits


def skip_teardown() -> None:
    """Skip the teardown when the interpreter ends, if :data:`exit_code` is set by then.

    Exit handlers of Python and C still run, because profilers need them to write their files, and open files are
    flushed; only modules and objects are not removed. Handlers run in reverse order, and the one that is registered
    here does not return. Therefore it is not registered if there already are others, such as those of a tracer that
    ``sitecustomize`` starts.

    A forked process ends like those of ``multiprocessing``, without exit handlers of C: those of torch alone remove
    C++ objects for 0.2 seconds. They run if a library was added to the process by one of :data:`ADDED_LIBRARIES`.
    """
    if atexit._ncallbacks() == 0:
        atexit.register(_exit)


def freeze_objects() -> None:
    """Exclude all objects from garbage collection, so that processes that are forked from this one share their memory.

    They remain excluded if the teardown is skipped, because visiting them would copy the memory of all of them.
    """
    gc.collect()
    _frozen_files.extend(_find_files())
    gc.freeze()


def _find_files() -> list[io.IOBase]:
    return [thing for thing in gc.get_objects() if type(thing) in FILES]


def _exit() -> None:
    if exit_code is None:
        gc.unfreeze()  # the teardown removes all objects
        return
    # the teardown would flush files that are still open, such as the log of a plug-in
    for file in (*_frozen_files, *_find_files()):
        with suppress(OSError, ValueError):  # the file is closed
            file.flush()
    import ctypes

    libc = ctypes.PyDLL(None)  # PyDLL keeps the interpreter's lock, so that no other thread runs Python code
    if is_forked and not any(os.environ.get(name) for name in ADDED_LIBRARIES):
        libc.fflush(None)
        os._exit(exit_code)
    libc.exit(exit_code)
