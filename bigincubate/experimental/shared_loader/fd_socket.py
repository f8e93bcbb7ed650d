"""Exchange JSON messages and shared memory between processes of one user on one machine.

The socket is in Linux's abstract namespace and the memory is anonymous, so nothing remains when a process is killed.
The socket preserves message boundaries. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from contextlib import suppress
from typing import Any

MAX_MESSAGE_BYTES = 1 << 16
CONNECT_TIMEOUT = 5.0  # seconds to wait for a server that is still starting


def _address(name: str, rank: int) -> str:
    return f"\0bigincubate-{name}-{rank}"


def listen(name: str, rank: int) -> socket.socket:
    """Return a listening socket.

    Args:
        name: A name that other users cannot guess.
        rank: The rank that the socket belongs to.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(_address(name, rank))
    listener.listen()
    return listener


def accept(listener: socket.socket) -> socket.socket | None:
    """Accept a connection and return it; close it and return None if it is from another user."""
    connection, _ = listener.accept()
    if not _is_same_user(connection):
        connection.close()
        return None
    return connection


def connect(name: str, rank: int) -> socket.socket | None:
    """Return a connection to the server of this user; None if there is none within `CONNECT_TIMEOUT`."""
    deadline = time.monotonic() + CONNECT_TIMEOUT
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with suppress(OSError):
            connection.connect(_address(name, rank))
            if _is_same_user(connection):
                return connection
        connection.close()
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


def send_message(connection: socket.socket, message: dict[str, Any], *descriptors: int) -> None:
    """Send a message and file descriptors, which are duplicated for the receiver.

    Raises:
        OSError: The connection is closed.
    """
    socket.send_fds(connection, [json.dumps(message).encode()], descriptors)


def recv_message(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return the next message and the file descriptors that came with it.

    Raises:
        OSError: The connection is closed, or there was no message within the socket's timeout.
    """
    text, descriptors, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 1)
    if not text:
        raise ConnectionError("connection closed")
    return json.loads(text), descriptors


def _is_same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] == os.getuid()
