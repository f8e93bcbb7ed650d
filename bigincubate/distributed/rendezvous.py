"""Check the address at which the ranks of a phase meet, before torch uses it."""

from __future__ import annotations

import os
import socket
import threading

from ..errors import ConfigError, SystemResourceError

RESOLVE_SECONDS = 20.0  # torch itself would try for COLLECTIVE_LIMIT
RETRY_SECONDS = 1.0


def check_rendezvous() -> None:
    """Check that ``MASTER_PORT`` is a port and that the name in ``MASTER_ADDR`` resolves on this machine.

    Raises:
        ConfigError: ``MASTER_PORT`` is not a port number.
        SystemResourceError: ``MASTER_ADDR`` does not resolve within `RESOLVE_SECONDS`.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ConfigError(
            f"the environment variable MASTER_PORT is {port!r}, not a port number from 1 to 65535; correct it"
            " where it is set, such as in the setup script of the job"
        )
    if problem := try_to_resolve(address):
        raise SystemResourceError(
            f"the host in MASTER_ADDR, {address!r}, does not resolve on {socket.gethostname()} ({problem}); set"
            " MASTER_ADDR to a name or address of the machine of rank 0 that all machines can reach, such as in the"
            " setup script of the job (setup_script in the recipe). GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose"
            " the network interface"
        )


def try_to_resolve(host: str) -> str | None:
    """Resolve a host name, repeatedly for up to `RESOLVE_SECONDS`, and return the last problem if it did not succeed.

    A name server that is overloaded by the start of a large job, or does not know a new node yet, needs several
    attempts. A resolver cannot be interrupted, so it runs in a thread, which is left behind if it never returns.
    """
    problems = ["the name service does not answer"]
    resolved, given_up = threading.Event(), threading.Event()

    def resolve() -> None:
        while not given_up.is_set():
            try:
                socket.getaddrinfo(host, None)
            except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name is empty or too long
                problems.append(getattr(error, "strerror", None) or str(error))
                given_up.wait(RETRY_SECONDS)
            else:
                resolved.set()
                return

    threading.Thread(target=resolve, name="resolve MASTER_ADDR", daemon=True).start()
    if resolved.wait(RESOLVE_SECONDS):
        return None
    given_up.set()
    return problems[-1]
