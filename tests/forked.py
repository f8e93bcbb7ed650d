"""The command line in real processes that start in no time: forked from one that has everything imported.

They are killed, signalled and looked at like any others. What they do is ``bigincubate.cli.main()``.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import itertools
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "bigincubate.cli",
        "bigincubate.training.run_phase",
        "bigincubate.planning.prepare_run",
        "bigincubate.interchange.export",
    ]
)
Before = Callable[[], None]
CLONE_NEWUTS, CLONE_NEWUSER = 0x04000000, 0x10000000  # linux/sched.h


class Command:
    """A running command. ``before`` is called in the process first, to spoil something on purpose."""

    def __init__(self, *arguments: object, before: Before | None = None, env: dict[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="forked-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        for name in ("out", "err"):
            (self.folder / name).touch()
        words = [str(argument) for argument in arguments]
        self.process = SERVER.Process(target=_main, args=(words, self.folder, before, env or {}))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def running(self) -> bool:
        return self.process.exitcode is None

    def wait(self, timeout: float = 120) -> int:
        """The exit code; minus the signal's number where one ended the process."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.err}")
        return code

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> int:
        """``kill -9``, wherever it is."""
        self.process.kill()
        return self.wait()

    def until(self, happened: Callable[[], object], pause: float = 0.001, timeout: float = 300) -> bool:
        """Wait for something to happen while the command runs; whether it did."""
        end = time.monotonic() + timeout
        while self.running and time.monotonic() < end:
            if happened():
                return True
            time.sleep(pause)
        return bool(happened())


def run(*arguments: object, before: Before | None = None, env: dict[str, str] | None = None) -> Command:
    """A command, to its end."""
    command = Command(*arguments, before=before, env=env)
    command.wait()
    return command


def _main(words: list[str], folder: Path, before: Before | None, env: dict[str, str]) -> None:
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["bigincubate", *words]
    from bigincubate.cli import main

    try:
        if before is not None:
            before()
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()  # processes of multiprocessing leave without


# ------------------------------------------------------------------------------------------------ a launcher's ranks


def fork_ranks() -> None:
    """From here on this process, a launcher, forks the ranks of its phases itself, without a fork server's imports."""
    from bigincubate.launchers import local
    from bigincubate.launchers import rank_group as ranks

    local.can_fork = lambda nproc, gpus: False
    ranks.Popen = ForkedRank  # type: ignore[assignment,misc]


class ForkedRank:
    """Replaces ``subprocess.Popen`` of ``python -m MODULE …`` by a forked process, without a new interpreter."""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: Any, **_: Any) -> None:
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=_rank, args=(command[2:], env, stdout.fileno()))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.process.pid or 0, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _rank(command: list[str], env: dict[str, str], output: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's own handlers were inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = command
    try:
        runpy.run_module(command[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()


def without_a_name() -> None:
    """This process and its children find themselves on a machine whose name nobody knows; or OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUTS) and libc.unshare(CLONE_NEWUSER | CLONE_NEWUTS):
        raise OSError(ctypes.get_errno(), "unshare")
    socket.sethostname("nobody-knows-me.invalid")


# ------------------------------------------------------------------------------------------------ what to spoil


def die_at_write(moment: int, delay: float = 0) -> None:
    """``kill -9`` before the ``moment``-th call that makes a change durable: an fsync, a rename, a removal.

    With a delay, the process dies that many seconds later, or at the sixth such call after the moment.
    """
    import shutil

    calls = itertools.count(1)  # a save writes in a thread of its own: no call may be missed or counted twice
    last = moment + 6 if delay else moment
    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
        original = getattr(owner, name)

        def call(*arguments: Any, original: Callable[..., Any] = original, **options: Any) -> Any:
            number = next(calls)
            if number == last:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == moment:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return original(*arguments, **options)

        setattr(owner, name, call)


def hold_step(step: int, phase: str = "") -> None:
    """Wait before this optimizer step, of one phase or of each, until a signal or another owner ends the training.

    Saves are completed in the meantime.
    """
    from bigincubate.training.trainer import Trainer

    original = Trainer.step

    def held_step(trainer: Trainer, batch: Any) -> Any:
        held = trainer.state.step + 1 == step and phase in ("", trainer.row.key)
        end = time.monotonic() + 300
        while held and not trainer.stop and not trainer.lease.lost:
            if time.monotonic() > end:
                os._exit(99)  # its test has failed, and pytest waits for this process
            time.sleep(0.001)
        return original(trainer, batch)

    Trainer.step = held_step  # type: ignore[assignment,method-assign]


def die_before(module: str, name: str) -> None:
    """``kill -9`` when this function or method of a module is called."""
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
