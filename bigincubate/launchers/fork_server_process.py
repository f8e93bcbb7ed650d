"""Run as the process of a :class:`~bigincubate.launchers.fork_server.ForkServer`: import everything, fork on request.

A forked process must not differ from one that has just been started. Therefore this process runs no torch operator
(whose threads would be missing after a fork), has a single thread, and does not initialize CUDA.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ..compat import interpreter_exit
from ..distributed.parent_death import stop_with_parent

# what a phase of any task imports before the end of its first step
MODULES = (
    "bigincubate.__main__",
    "bigincubate.cli",
    "bigincubate.api",
    "bigincubate.training.run_phase",
    "bigincubate.data.streams",
    "bigincubate.launchers.slurm.environment",
)


def main() -> None:
    """Serve requests. In a forked process, run the requested command."""
    stop_with_parent()
    connection, initial = socket.socket(fileno=int(sys.argv[1])), dict(os.environ)
    for module in (*MODULES, *sys.argv[2:]):  # and those of the task
        importlib.import_module(module)
    arguments = serve(connection, initial)
    if arguments is not None:
        program = sys.modules["bigincubate.__main__"]
        # as in a process of `python -m bigincubate`; its own child processes read these too
        sys.modules["__main__"], sys.argv = program, [str(program.__file__), *arguments]
        program.main()


def serve(connection: socket.socket, initial: Mapping[str, str]) -> list[str] | None:
    """Fork a process for each request until the connection is closed.

    Args:
        connection: Socket over which the launcher sends requests.
        initial: The environment variables of this process before the imports.

    Returns:
        In a forked process, the arguments of its command; in this process, None.
    """
    stop_threads()
    # otherwise the collector would write to the memory of all objects, and so copy it in each process
    interpreter_exit.freeze_objects()
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1, 3)
        if not message or not is_safe_to_fork():
            return None
        middle = os.fork()
        if middle == 0:
            middle = os.getpid()
            if os.fork() > 0:
                os._exit(0)  # its child becomes a child of the launcher
            connection.close()
            while os.getppid() == middle:  # until the launcher has adopted this process
                time.sleep(0.001)
            return prepare(initial, *files)
        os.waitpid(middle, 0)
        for file in files:
            os.close(file)


def stop_threads() -> None:
    """Stop the threads that OpenBLAS started when NumPy was imported.

    OpenBLAS itself stops them before a fork, so this forks a child, which exits at once.
    """
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def is_safe_to_fork() -> bool:
    """Return whether this process has a single thread and has not initialized CUDA."""
    import torch

    return len(list(Path("/proc/self/task").iterdir())) == 1 and not torch.cuda.is_initialized()


def prepare(initial: Mapping[str, str], request_file: int, log: int, status: int) -> list[str]:
    """Give a forked process its own session, log, environment and random numbers, and announce its pid.

    Args:
        initial: The environment variables of the server before the imports.
        request_file: File with the request: the arguments and the environment variables of the command.
        log: File to which output is appended.
        status: Pipe for the pid.

    Returns:
        The arguments of its command.
    """
    import numpy as np

    interpreter_exit.is_forked = True
    os.setsid()
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    with os.fdopen(request_file, "rb") as file:
        request = json.load(file)
    # change only what differs from the server's variables, because imports have also set some
    variables = request["environment"]
    for name in initial.keys() - variables.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in variables.items() if initial.get(name) != value})
    np.random.seed()  # otherwise the legacy generator would have the same state in all forked processes
    try:
        os.write(status, b"%d" % os.getpid())
    except BrokenPipeError:  # the launcher has ended, or has killed this process before it existed
        os._exit(1)
    os.close(status)
    arguments: list[str] = request["arguments"]
    return arguments


if __name__ == "__main__":
    main()
