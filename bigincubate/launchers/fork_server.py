"""Start phases as copies of a process that has already imported torch, so that not every phase imports it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired

from ..distributed.parent_death import PARENT_VARIABLE
from ..errors import Exit, format_os_error
from .rank_group import GRACE_SECONDS, RankProcess, start_process

COMMAND = (sys.executable, "-m", "bigincubate")  # the beginning of each command that a server can run


class ForkServer:
    """A process that has imported what a phase needs, and forks a copy of itself for each rank of a phase.

    A copy is a child of the launcher, not of the server, so the server can end at any time without ending a phase: a
    child of the server forks the copy and exits at once, which makes the copy an orphan that the launcher adopts.
    Therefore requests must be sent within :func:`~bigincubate.distributed.parent_death.adopt_orphans`.

    Attributes:
        process: The server.
        started: The processes that were requested and may have left other processes behind.
        connection: Socket over which requests are sent. The server ends when it is closed, and when this process ends,
            even if a child of this process still has the socket open.
    """

    def __init__(self, process: Popen[bytes], connection: socket.socket) -> None:
        self.process, self.connection = process, connection
        self.started: list[ForkedProcess] = []

    @classmethod
    def start(cls, environment: Mapping[str, str], modules: Sequence[str] = ()) -> ForkServer:
        """Start a server, which then begins to import.

        Args:
            environment: All environment variables of the server. Libraries read some of them when they are imported,
                so the server must start only phases with the same variables.
            modules: Modules to import besides those that all phases need.

        Raises:
            OSError: The server could not be started.
        """
        own, theirs = socket.socketpair()
        try:
            with theirs:
                program = "bigincubate.launchers.fork_server_process"
                command = [sys.executable, "-m", program, str(theirs.fileno()), *modules]
                process = Popen(
                    command,
                    env={**environment, PARENT_VARIABLE: str(os.getpid())},
                    stdin=DEVNULL,
                    stdout=DEVNULL,
                    stderr=DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except OSError:
            own.close()
            raise
        return cls(process, own)

    def start_process(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> RankProcess:
        """Start a process, like :func:`~bigincubate.launchers.rank_group.start_process`.

        The process starts once the server has imported everything. If the server has ended, or ends before that, the
        process is started without a server.

        Args:
            command: ``COMMAND`` and arguments.
            environment: All environment variables of the process.
            log: File to which output is appended.

        Raises:
            OSError: The log could not be opened, or the process could not be started.
        """

        def start_new() -> RankProcess:
            return start_process(command, environment, log)

        request = {"arguments": list(command[len(COMMAND) :]), "environment": dict(environment)}
        status, written_status = os.pipe()
        os.set_blocking(status, False)
        try:
            with (
                os.fdopen(written_status, "wb") as answer,  # first, so that it is closed in any case
                log.open("ab") as output,
                os.fdopen(os.memfd_create("request"), "w+b") as file,
            ):
                file.write(json.dumps(request).encode())
                file.seek(0)
                socket.send_fds(self.connection, [b"1"], [file.fileno(), output.fileno(), answer.fileno()])
        except ConnectionError:  # the server has ended
            os.close(status)
            return start_new()
        except OSError:
            os.close(status)
            raise
        self.started.append(ForkedProcess(status, start_new, log))
        return self.started[-1]

    def reap_orphans(self) -> None:
        """Wait for processes that have ended after the process that started them: workers of a phase that was killed.

        This process has adopted them, so they would remain zombies.
        """
        self.started = [process for process in self.started if not process.reap_group()]

    def close(self) -> None:
        """Let the server end after it has served the requests that were already sent."""
        self.connection.close()

    def kill(self) -> None:
        """End the server at once. The processes that it has started continue."""
        self.close()
        self.process.kill()
        with suppress(TimeoutExpired):  # the kernel waits for its storage
            self.process.wait(GRACE_SECONDS)
        self.reap_orphans()


class ForkedProcess:
    """A process that a server has been requested to start.

    Args:
        status: Read end of a pipe on which the process announces its pid; closed without data if it was not started.
        start_new: Starts the same process without a server.
        log: The log file of the process.
    """

    def __init__(self, status: int, start_new: Callable[[], RankProcess], log: Path) -> None:
        self._status, self._start_new, self._log = status, start_new, log
        self._new: RankProcess | None = None
        self._pid: int | None = None
        self._code: int | None = None
        self._signal: int | None = None  # the last one that was sent before the process existed

    @property
    def pid(self) -> int | None:
        """The process id, or None if the process did not exist yet when :meth:`poll` was last called."""
        return self._new.pid if self._new is not None else self._pid

    def poll(self) -> int | None:
        """Return the exit code, or None if the process has not ended.

        If a signal ended the process, the code is minus the number of the signal.
        """
        if self._pid is None and self._new is None and self._code is None:
            self._receive_pid()
        if self._new is not None:
            return self._new.poll()
        if self._pid is not None and self._code is None:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            except ChildProcessError:  # another part of the program has waited for it; subprocess.Popen does the same
                self._code = 0
        return self._code

    def reap_group(self) -> bool:
        """Wait for those of the processes it has left behind that have ended.

        Returns:
            Whether it has ended and none of them is left.
        """
        if self.poll() is None:
            return False
        if self._pid is None:
            return True
        with suppress(ChildProcessError):
            while os.waitpid(-self._pid, os.WNOHANG)[0]:  # it leads its process group
                pass
            return False
        return True

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended.

        A process that does not exist yet receives the last of its signals as soon as it does. If the server ends before
        that, the process is not started, as if this signal had ended it. After SIGKILL, it never runs, even if this
        object is deleted before the server answers.
        """
        if self.poll() is not None:
            return
        if self._new is not None:
            self._new.send_signal(number)
        elif self._pid is not None:
            self._kill(self._pid, number)
        elif number == signal.SIGKILL:
            os.close(self._status)  # the process exits when it cannot announce its pid
            self._code = -number
        else:
            self._signal = number

    @staticmethod
    def _kill(pid: int, number: int) -> None:
        with suppress(ProcessLookupError):  # another part of the program has waited for it
            os.kill(pid, number)

    def _receive_pid(self) -> None:
        """Read the pid if it has been sent. Start the process without the server if the server has ended."""
        try:
            text = os.read(self._status, 32)  # the pid is written in one piece
        except BlockingIOError:
            return
        os.close(self._status)
        if text:
            self._pid = int(text)
            if self._signal is not None:
                self._kill(self._pid, self._signal)
        elif self._signal is not None:
            self._code = -self._signal
        else:
            try:
                self._new = self._start_new()
            except OSError as error:
                with suppress(OSError), self._log.open("a") as log:
                    log.write(f"bigincubate: {format_os_error(error)}\n")
                self._code = Exit.ENVIRONMENT


class ForkServers:
    """One fork server for each set of environment variables. As a context manager, it ends all servers.

    Args:
        modules: Modules that the servers import besides those that all phases need.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._modules = modules
        self._servers: dict[frozenset[tuple[str, str]], ForkServer] = {}
        self._closed: list[ForkServer] = []

    def __enter__(self) -> ForkServers:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def find(self, environment: Mapping[str, str]) -> ForkServer:
        """Return the server whose variables are equal to ``environment``; start it if there is none.

        A server that has ended unexpectedly is returned too: it is not started again.

        Raises:
            OSError: The server could not be started.
        """
        key = frozenset(environment.items())
        if key not in self._servers:
            self._servers[key] = ForkServer.start(environment, self._modules)
        return self._servers[key]

    def reap_orphans(self) -> None:
        """See :meth:`ForkServer.reap_orphans`."""
        for server in (*self._servers.values(), *self._closed):
            server.reap_orphans()

    def close(self) -> None:
        """Let all servers end after they have served the requests that were already sent."""
        for server in self._servers.values():
            server.close()
        self._closed += self._servers.values()
        self._servers.clear()

    def kill(self) -> None:
        """End all servers at once. The processes that they have started continue."""
        self.close()
        while self._closed:
            self._closed.pop().kill()


def can_fork(nproc: int, gpus: Sequence[str]) -> bool:
    """Return whether fork servers can start the phases on this machine.

    This needs Linux, where a process can adopt orphans. Several ranks with GPUs use NCCL, which is not known to work in
    a process that was forked after torch was imported.

    Args:
        nproc: Number of ranks of each phase.
        gpus: The visible GPUs.
    """
    return sys.platform.startswith("linux") and (nproc == 1 or not gpus)
