"""Start, stop and wait for the ranks of one phase on this machine as a group."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any, Protocol

from ..distributed.parent_death import PARENT_VARIABLE
from ..errors import Exit

FOLLOW_SECONDS = 10.0  # seconds from the first rank's exit until the other ranks are asked to stop
GRACE_SECONDS = 10.0  # seconds from then until they are killed
STOP_SECONDS = 1800.0  # seconds from a stop request, after which ranks write a checkpoint, until they are killed
SPECIFIC_CODES = set(Exit) - {Exit.DONE, Exit.PREEMPTED}  # exit codes of specific errors


class RankProcess(Protocol):
    """The process of a rank: a :class:`subprocess.Popen`, or one that a fork server starts."""

    @property
    def pid(self) -> int | None:
        """The process id, or None if the process does not exist yet."""

    def poll(self) -> int | None:
        """Return the exit code, or None if the process has not ended.

        If a signal ended the process, the code is minus the number of the signal.
        """

    def send_signal(self, number: int, /) -> None:
        """Send a signal, unless the process has ended."""


def start_process(command: Sequence[str], environment: Mapping[str, str], log: Path) -> RankProcess:
    """Start a process.

    Args:
        command: Program and arguments.
        environment: All environment variables of the process.
        log: File to which output is appended.

    Raises:
        OSError: The log could not be opened, or the process could not be started.
    """
    with log.open("ab") as output:
        # in a new session, so that Ctrl-C reaches only the launcher, which stops the ranks once
        return Popen(
            command, env=dict(environment), stdin=DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


StartProcess = Callable[[Sequence[str], Mapping[str, str], Path], RankProcess]


class RankGroup:
    """One process per rank, all with the same command.

    Each process reads its rank from ``torchrun``'s environment variables, and stops when this process ends (see
    :mod:`bigincubate.distributed.parent_death`).

    Args:
        processes: One process per rank.
        logs: The log file of each rank.
        store: The rendezvous store of the ranks, kept open as long as the group exists; None for a single rank.
    """

    def __init__(self, processes: list[RankProcess], logs: Sequence[Path], store: Any = None) -> None:
        self.processes, self.logs, self.store = processes, logs, store
        self.exit_codes: dict[int, int] = {}  # by rank, in the order in which ranks were found to have exited
        self.terminated: set[int] = set()  # ranks that were stopped because they did not exit with the others
        self.stop_requested, self.stop_requested_at = False, 0.0
        self.first_exit = 0.0  # time at which the first exit was found

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        logs: Sequence[Path],
        start_process: StartProcess = start_process,
    ) -> RankGroup:
        """Start the command once per log file.

        Args:
            command: Program and arguments.
            environment: Environment variables of all ranks; the variables of each rank are added.
            logs: The log file of each rank, to which output is appended. Their folder is created if needed.
            start_process: Starts the process of a rank.

        Raises:
            OSError: A rank could not be started. The other ranks have been killed.
        """
        world = len(logs)
        logs[0].parent.mkdir(parents=True, exist_ok=True)
        store, store_variables = create_rendezvous_store() if world > 1 else (None, {})
        processes: list[RankProcess] = []
        try:
            for rank, log in enumerate(logs):
                numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
                own = {**environment, **store_variables, PARENT_VARIABLE: str(os.getpid())}
                own |= {name: str(value) for name, value in numbers.items()}
                processes.append(start_process(command, own, log))
        except OSError:
            for process in processes:
                process.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + GRACE_SECONDS
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                time.sleep(0.02)
            raise
        return cls(processes, logs, store)

    def stop(self) -> None:
        """Ask every rank to write a checkpoint and exit. Only the first call does anything."""
        if not self.stop_requested:
            self.stop_requested, self.stop_requested_at = True, time.monotonic()
            for process in self.processes:
                process.send_signal(signal.SIGTERM)

    def shut_down(self) -> None:
        """Ask every rank to exit, and wait for all of them. Ranks that take too long are killed.

        A rank that does not end even then (the kernel waits for its storage) is left behind.
        """
        self.stop()
        deadline = time.monotonic() + GRACE_SECONDS
        while self.poll() is None and time.monotonic() < deadline + GRACE_SECONDS:
            if time.monotonic() > deadline:
                for process in self.processes:
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.02)

    def poll(self) -> int | None:
        """Return the exit code of the group, or None while a rank is running.

        After one rank has exited, the other ranks must exit within ``FOLLOW_SECONDS``; otherwise they are stopped.
        After a stop request, a rank is killed if it takes longer than ``STOP_SECONDS``, or if it is suspended and
        therefore cannot write a checkpoint.
        """
        for rank, process in enumerate(self.processes):
            if rank not in self.exit_codes and (code := process.poll()) is not None:
                self.first_exit = self.first_exit if self.exit_codes else time.monotonic()
                self.exit_codes[rank] = code
        if len(self.exit_codes) == len(self.processes):
            return self.exit_codes[self.cause_rank]
        stopping = time.monotonic() - self.stop_requested_at if self.stop_requested else 0.0
        for rank in set(range(len(self.processes))).difference(self.exit_codes):
            if stopping > STOP_SECONDS or (stopping > GRACE_SECONDS and is_suspended(self.processes[rank].pid)):
                self.processes[rank].send_signal(signal.SIGKILL)
        if self.exit_codes:
            overdue = time.monotonic() - self.first_exit - FOLLOW_SECONDS
            for rank in set(range(len(self.processes))).difference(self.exit_codes):
                # a suspended process cannot handle SIGTERM
                if overdue > GRACE_SECONDS or is_suspended(self.processes[rank].pid):
                    self.terminated.add(rank)
                    self.processes[rank].send_signal(signal.SIGKILL)
                elif overdue > 0 and rank not in self.terminated:
                    self.terminated.add(rank)
                    self.processes[rank].send_signal(signal.SIGTERM)
        return None

    @property
    def cause_rank(self) -> int:
        """Return the rank whose exit best explains why the group ended.

        In order of preference: the lowest rank that reported a specific error; a rank that was stopped before it was
        ready; one that was killed; one that crashed, often because another rank was gone; one that saved a checkpoint.
        """

        def priority(rank: int) -> tuple[int, ...]:
            code = self.exit_codes[rank]
            specific, not_ready = code in SPECIFIC_CODES, self.stop_requested and code == -signal.SIGTERM
            crashed = code not in (Exit.DONE, Exit.PREEMPTED)
            return (specific, -rank * specific, not_ready, code < 0, crashed, code != Exit.DONE)

        return max([rank for rank in self.exit_codes if rank not in self.terminated], key=priority)

    @property
    def log(self) -> Path:
        """Return the log of :attr:`cause_rank`."""
        return self.logs[self.cause_rank]

    @property
    def reason(self) -> str:
        """Return one line that explains why the group ended."""
        code = self.exit_codes[self.cause_rank]
        text = last_log_line(self.log) if code >= 0 else f"ended by signal {-code} ({signal.strsignal(-code)})"
        all_equal = len(set(self.exit_codes.values())) == 1 and not self.terminated
        return text if all_equal else f"rank {self.cause_rank}: {text}"


def create_rendezvous_store() -> tuple[Any, dict[str, str]]:
    """Create a rendezvous store for the ranks of this machine.

    Its port is bound before any rank starts, no host name is resolved, and it listens only on the loopback interface.

    Returns:
        The store, which must be kept open, and the environment variables with which the ranks find it. ``torchrun``
        sets the same ones, because its agent also creates the store.
    """
    from torch.distributed import TCPStore

    host, listener = "127.0.0.1", socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    return store, {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": loopback,  # otherwise gloo resolves this machine's host name
    }


def is_suspended(pid: int | None) -> bool:
    """Return whether a process of this host is stopped (SIGSTOP)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def last_log_line(log: Path) -> str:
    """Return the last nonblank line of a log."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1] if lines else "no output"
