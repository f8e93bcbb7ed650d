"""The ranks of one phase on this machine: started together, stopped together, gone together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Exit
from .orphan import PARENT

FOLLOW = 10.0  # seconds from the first rank's end until those that stayed are asked to stop
GRACE = 10.0  # seconds from then until they are killed
NO_STORE: tuple[Any, dict[str, str]] = (None, {})  # one rank need not find itself
CAUSES = set(Exit) - {Exit.DONE, Exit.PREEMPTED}


class Ranks:
    """One command in as many processes as there are logs. Each learns from its environment which rank it is, as under
    ``torchrun``, and none outlives this process (see :mod:`.orphan`).

    Args:
        logs: a file a rank, to which it appends its output.

    Raises:
        OSError: a rank could not be started; none runs then.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], logs: Sequence[Path]) -> None:
        world = len(logs)
        self.logs = logs
        self.processes: list[subprocess.Popen[bytes]] = []
        self.left: dict[int, int] = {}  # exit codes, in the order in which they were seen
        self.ended: set[int] = set()  # ranks that had to be told to leave
        self.asked = False
        self.since = 0.0  # when the first one was seen to have left
        self.store, where = rendezvous() if world > 1 else NO_STORE
        try:
            for rank, log in enumerate(logs):
                who = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
                own = {**environment, **where, PARENT: str(os.getpid())}
                own |= {name: str(value) for name, value in who.items()}
                with log.open("ab") as output:
                    # a session of its own: Ctrl-C reaches the launcher alone, which passes it on once
                    self.processes.append(
                        subprocess.Popen(
                            command,
                            env=own,
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=output,
                            start_new_session=True,
                        )
                    )
        except OSError:
            for process in self.processes:
                process.kill()
                process.wait()
            raise

    def stop(self) -> None:
        """Ask every rank for a checkpoint and to leave; once, whoever asks again."""
        if not self.asked:
            self.asked = True
            for process in self.processes:
                process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Ask every rank to leave, and wait until none runs; who stays for long is killed."""
        self.stop()
        deadline = time.monotonic() + GRACE
        while self.poll() is None:
            if time.monotonic() > deadline:
                for process in self.processes:
                    process.kill()
            time.sleep(0.02)

    def poll(self) -> int | None:
        """The exit code of all together, once none runs. Ranks leave together: when one has, the others are given
        some time to follow."""
        for rank, process in enumerate(self.processes):
            if rank not in self.left and (code := process.poll()) is not None:
                self.since = self.since if self.left else time.monotonic()
                self.left[rank] = code
        if len(self.left) == len(self.processes):
            return self.left[self.cause]
        if self.left:
            over = time.monotonic() - self.since - FOLLOW
            for rank in set(range(len(self.processes))).difference(self.left):
                if over > GRACE or suspended(self.processes[rank].pid):  # it cannot follow
                    self.ended.add(rank)
                    self.processes[rank].kill()
                elif over > 0 and rank not in self.ended:
                    self.ended.add(rank)
                    self.processes[rank].terminate()
        return None

    @property
    def cause(self) -> int:
        """The rank whose end says most about why all ended: it knew the reason (the lowest of those that did); it was
        stopped before it had begun; it was killed; it crashed, often because another was gone; it left with a
        checkpoint."""

        def says(rank: int) -> tuple[int, ...]:
            code = self.left[rank]
            known, unbegun = code in CAUSES, self.asked and code == -signal.SIGTERM
            crashed = code not in (Exit.DONE, Exit.PREEMPTED)
            return (known, -rank * known, unbegun, code < 0, crashed, code != Exit.DONE)

        return max([rank for rank in self.left if rank not in self.ended], key=says)

    @property
    def log(self) -> Path:
        """Of the rank that caused the end."""
        return self.logs[self.cause]

    @property
    def reason(self) -> str:
        """One line about why all ended."""
        code = self.left[self.cause]
        text = last_line(self.log) if code >= 0 else f"ended by signal {-code} ({signal.strsignal(-code)})"
        alike = len(set(self.left.values())) == 1 and not self.ended
        return text if alike else f"rank {self.cause}: {text}"


def rendezvous() -> tuple[Any, dict[str, str]]:
    """A store where ranks of this machine find each other, and the variables that lead them there (those of
    ``torchrun``, whose agent has such a store too). Its port is bound before anybody is told of it; no name is
    resolved; and nobody outside this machine can reach it."""
    from torch.distributed import TCPStore

    host, listener = "127.0.0.1", socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    return store, {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": loopback,  # else gloo asks for the address of this machine's name
    }


def suspended(pid: int) -> bool:
    """Whether a process of this host was stopped (SIGSTOP)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1] if lines else "no output"
