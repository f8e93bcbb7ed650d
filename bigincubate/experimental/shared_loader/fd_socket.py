"""How processes of this user on this machine hand memory to each other: JSON messages on a socket, memory beside them.

The socket is Linux's: its address is no file and the memory has no name, so nothing is left behind, whoever is killed.
It keeps messages apart. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from contextlib import suppress
from typing import Any

LONGEST = 1 << 16  # bytes of a message
CONNECT = 5.0  # seconds that the other side may need to be there


def address(place: str, rank: int) -> str:
    return f"\0bigincubate-{place}-{rank}"


def listen(place: str, rank: int) -> socket.socket:
    """
    Args:
        place: a name that nobody can guess. rank: there is a socket for each.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address(place, rank))
    listener.listen()
    return listener


def accept(listener: socket.socket) -> socket.socket | None:
    """The next one that has come; None where it is not this user's, and was sent away."""
    line, _ = listener.accept()
    if not _ours(line):
        line.close()
        return None
    return line


def connect(place: str, rank: int) -> socket.socket | None:
    """To who listens there; None where nobody of this user does."""
    deadline = time.monotonic() + CONNECT
    while True:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with suppress(OSError):
            line.connect(address(place, rank))
            if _ours(line):
                return line
        line.close()
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


def tell(line: socket.socket, message: dict[str, Any], *memory: int) -> None:
    """
    Args:
        memory: descriptors that the other side gets as its own.

    Raises:
        OSError: the other side is gone.
    """
    socket.send_fds(line, [json.dumps(message).encode()], memory)


def hear(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message, and the descriptors that came with it.

    Raises:
        OSError: the other side is gone, or said nothing for as long as the socket waits.
    """
    text, memory, _, _ = socket.recv_fds(line, LONGEST, 1)
    if not text:
        raise ConnectionError("it has ended")
    return json.loads(text), memory


def _ours(line: socket.socket) -> bool:
    """Whether the other side belongs to this user."""
    credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] == os.getuid()
