"""Start, stop and wait for the ranks of one phase on this machine as a group."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from ..distributed.parent_death import PARENT_VARIABLE
from ..errors import Exit

FOLLOW_SECONDS = 10.0  # seconds after the first rank's exit until the remaining ranks are asked to stop
GRACE_SECONDS = 10.0  # seconds after that until they are killed
SPECIFIC_CODES = set(Exit) - {Exit.DONE, Exit.PREEMPTED}  # exit codes that name a reason


class RankGroup:
    """The same command in one process per log file.

    Each process finds its rank in ``torchrun``'s environment variables, and stops when this process ends (see
    :mod:`bigincubate.distributed.parent_death`).

    Args:
        processes: One process per rank.
        logs: One file per rank with its output.
        store: The store in which the ranks find each other, kept alive as long as the group; None for a single rank.
    """

    def __init__(self, processes: list[Popen[bytes]], logs: Sequence[Path], store: Any = None) -> None:
        self.processes, self.logs, self.store = processes, logs, store
        self.exit_codes: dict[int, int] = {}  # by rank, in the order in which they were seen
        self.terminated: set[int] = set()  # ranks that were made to exit because they did not follow the others
        self.stop_requested = False
        self.first_exit = 0.0  # when the first exit was seen

    @classmethod
    def start(cls, command: Sequence[str], environment: Mapping[str, str], logs: Sequence[Path]) -> RankGroup:
        """Start the command once per log file.

        Args:
            command: Program and arguments.
            environment: Environment variables of every rank, to which those of the rank are added.
            logs: One file per rank, to which the rank's output is appended, in a folder that is created if needed.

        Raises:
            OSError: A rank could not be started. Then none is left running.
        """
        world = len(logs)
        logs[0].parent.mkdir(parents=True, exist_ok=True)
        store, store_variables = create_rendezvous_store() if world > 1 else (None, {})
        processes: list[Popen[bytes]] = []
        try:
            for rank, log in enumerate(logs):
                numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
                own = {**environment, **store_variables, PARENT_VARIABLE: str(os.getpid())}
                own |= {name: str(value) for name, value in numbers.items()}
                with log.open("ab") as output:
                    # in a new session: Ctrl-C reaches only the launcher, which passes it on once
                    processes.append(
                        Popen(command, env=own, stdin=DEVNULL, stdout=output, stderr=output, start_new_session=True)
                    )
        except OSError:
            for process in processes:
                process.kill()
                process.wait()
            raise
        return cls(processes, logs, store)

    def stop(self) -> None:
        """Ask every rank to write a checkpoint and exit. Only the first call does anything."""
        if not self.stop_requested:
            self.stop_requested = True
            for process in self.processes:
                process.send_signal(signal.SIGTERM)

    def shut_down(self) -> None:
        """Ask every rank to exit, and wait until all have. Those that take too long are killed."""
        self.stop()
        deadline = time.monotonic() + GRACE_SECONDS
        while self.poll() is None:
            if time.monotonic() > deadline:
                for process in self.processes:
                    process.kill()
            time.sleep(0.02)

    def poll(self) -> int | None:
        """Return the exit code of the group, or None while a rank runs.

        All ranks exit together: once one has, the others have some time to follow before they are made to.
        """
        for rank, process in enumerate(self.processes):
            if rank not in self.exit_codes and (code := process.poll()) is not None:
                self.first_exit = self.first_exit if self.exit_codes else time.monotonic()
                self.exit_codes[rank] = code
        if len(self.exit_codes) == len(self.processes):
            return self.exit_codes[self.cause_rank]
        if self.exit_codes:
            overdue = time.monotonic() - self.first_exit - FOLLOW_SECONDS
            for rank in set(range(len(self.processes))).difference(self.exit_codes):
                if overdue > GRACE_SECONDS or is_suspended(self.processes[rank].pid):  # it cannot exit
                    self.terminated.add(rank)
                    self.processes[rank].kill()
                elif overdue > 0 and rank not in self.terminated:
                    self.terminated.add(rank)
                    self.processes[rank].terminate()
        return None

    @property
    def cause_rank(self) -> int:
        """Return the rank whose exit explains best why the group ended.

        In this order: a rank that reported a specific error (the lowest one); one that was stopped before it had
        begun; one that was killed; one that crashed, often because another rank was gone; one that saved a checkpoint.
        """

        def explanatory_power(rank: int) -> tuple[int, ...]:
            code = self.exit_codes[rank]
            specific, not_begun = code in SPECIFIC_CODES, self.stop_requested and code == -signal.SIGTERM
            crashed = code not in (Exit.DONE, Exit.PREEMPTED)
            return (specific, -rank * specific, not_begun, code < 0, crashed, code != Exit.DONE)

        return max([rank for rank in self.exit_codes if rank not in self.terminated], key=explanatory_power)

    @property
    def log(self) -> Path:
        """Return the log of the rank that explains why the group ended."""
        return self.logs[self.cause_rank]

    @property
    def reason(self) -> str:
        """Return one line that says why the group ended."""
        code = self.exit_codes[self.cause_rank]
        text = last_log_line(self.log) if code >= 0 else f"ended by signal {-code} ({signal.strsignal(-code)})"
        alike = len(set(self.exit_codes.values())) == 1 and not self.terminated
        return text if alike else f"rank {self.cause_rank}: {text}"


def create_rendezvous_store() -> tuple[Any, dict[str, str]]:
    """Create a store in which the ranks of this machine find each other.

    Its port is bound before any rank starts, no host name is resolved, and it listens only on the loopback interface.

    Returns:
        The store, which lives as long as the object, and the environment variables that the ranks need to find it:
        those of ``torchrun``, whose agent has such a store too.
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


def is_suspended(pid: int) -> bool:
    """Return whether a process of this host is stopped (SIGSTOP)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def last_log_line(log: Path) -> str:
    """Return the last line of a log that is not blank."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1] if lines else "no output"
