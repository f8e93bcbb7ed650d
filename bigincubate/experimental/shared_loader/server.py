"""The server of the shared loader, which loads the batches of one rank and sends each batch to all modules."""

from __future__ import annotations

import math
import os
import selectors
import socket
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from ...data.batch import Batch
from ...errors import ExternalError
from ...tasks.base import TrainBatches
from .fd_socket import accept, recv_message, send_message
from .packing import pack_batch

MAX_AHEAD = 4  # maximum number of batches between the slowest client and the newest batch
PATIENCE = 60.0  # seconds that clients wait for a late or stopped client
POLL_INTERVAL = 0.2  # seconds between checks for a stop request


@dataclass(eq=False)
class _Client:
    connection: socket.socket
    step: int = -1  # the step that it requested last; -1 before its first request
    requested_at: float = field(default_factory=time.monotonic)


class SharedLoaderServer:
    """Send the batches of a stream to all clients that connect.

    The first batch is that of the lowest requested step. It is loaded when all expected clients have connected and
    requested a step, or ``patience`` seconds after the first client connected. The server is at most `MAX_AHEAD`
    batches ahead of the slowest client. It refuses clients that request an earlier step, and clients that made others
    wait for ``patience`` seconds.

    Args:
        listener: The socket that clients connect to.
        stream: The stream of batches.
        digest: The stream's `batch_digest`; clients must have the same.
        clients: Number of clients to expect.
        steps: Number of steps; later batches are not loaded.
        patience: Seconds that clients wait for a late client.

    Attributes:
        batches_made: Number of batches loaded.
        batches_sent: Number of batches sent; each batch counts once per client.
    """

    def __init__(
        self,
        listener: socket.socket,
        stream: TrainBatches,
        digest: str,
        *,
        clients: int,
        steps: int,
        patience: float = PATIENCE,
    ) -> None:
        self.stream, self.digest, self.steps, self.patience = stream, digest, steps, patience
        self.batches_made = self.batches_sent = 0
        self._clients: list[_Client] = []
        self._missing = clients  # number of clients that have not connected yet
        self._first_connected_at = math.inf
        self._stopping = False
        self._step = 0  # step of the next batch
        self._notified_at = time.monotonic()  # when waiting clients were last told to wait
        self._batches: Generator[Batch, None, None] | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self, stop_requested: Callable[[], object]) -> None:
        """Serve until ``stop_requested()`` is true (no new clients are expected then) and all clients disconnected."""
        while True:
            self._stopping = bool(stop_requested())
            self._poll(0 if self._batch_is_due() else POLL_INTERVAL)
            if self._stopping and not self._clients:
                break
            if self._batch_is_due():
                self._make_batch()
            else:
                self._refuse_slow_clients()
                self._notify_waiting_clients()
        if self._batches is not None:
            self._batches.close()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    # -------------------------------------------------------------------------------------- clients

    def _poll(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            if key.data is not None:
                self._receive(key.data)
            elif (connection := accept(key.fileobj)) is not None:  # type: ignore[arg-type]
                connection.setblocking(False)
                self._clients.append(client := _Client(connection))
                self._selector.register(connection, selectors.EVENT_READ, client)
                self._missing -= 1
                self._first_connected_at = min(self._first_connected_at, client.requested_at)

    def _receive(self, client: _Client) -> None:
        try:
            request, _ = recv_message(client.connection)
        except OSError:
            self._disconnect(client)
            return
        if client not in self._clients:
            return  # already refused, but the client has not read the message yet
        if request["digest"] != self.digest:
            self._dismiss(client, refused="it has other data or settings")
        elif client.step < 0 and request["step"] < self._step:
            self._dismiss(client, refused=f"it is already past step {request['step']}")
        else:
            client.step, client.requested_at = request["step"], time.monotonic()

    def _dismiss(self, client: _Client, **reason: str) -> None:
        """Tell a client why it gets no more batches. The client then closes the connection."""
        self._clients.remove(client)
        self._send(client, reason)

    def _refuse_slow_clients(self) -> None:
        active = [client for client in self._clients if client.step >= 0]
        waiting = [client.requested_at for client in active if client.step == self._step]
        slow = [client for client in active if client.step <= self._step - MAX_AHEAD]
        if waiting and slow:
            since = max(min(waiting), *(client.requested_at for client in slow))
            if time.monotonic() - since > self.patience:
                for client in slow:
                    self._dismiss(client, refused=f"other modules waited {self.patience:g} s for this module")

    def _notify_waiting_clients(self) -> None:
        """Tell clients that wait for slower clients that the server is still running."""
        if (now := time.monotonic()) - self._notified_at > self.patience / 4:
            self._notified_at = now
            for client in [client for client in self._clients if client.step >= self._step]:
                self._send(client, {"wait": self._step})

    def _send(self, client: _Client, message: dict[str, Any], *descriptors: int) -> bool:
        try:
            send_message(client.connection, message, *descriptors)
        except OSError:
            self._disconnect(client)
            return False
        return True

    def _disconnect(self, client: _Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
        self._selector.unregister(client.connection)
        client.connection.close()

    # -------------------------------------------------------------------------------------- batches

    def _batch_is_due(self) -> bool:
        steps = [client.step for client in self._clients if client.step >= 0]
        clients_missing = self._missing > 0 or len(steps) < len(self._clients)
        if not steps or (clients_missing and not self._started()):
            return False
        return max(self._step, min(steps)) < min(min(steps) + MAX_AHEAD, self.steps)

    def _started(self) -> bool:
        waited = time.monotonic() - self._first_connected_at
        return bool(self.batches_made) or self._stopping or waited > self.patience

    def _make_batch(self) -> None:
        """Load the next batch and send it to all clients that need it."""
        lowest = min(client.step for client in self._clients if client.step >= 0)
        if self._batches is None or lowest > self._step:  # no client needs the steps in between
            if self._batches is not None:
                self._batches.close()
            self._step = max(lowest, self._step)
            self._batches = self.stream.batches(self._step)
        receivers = [client for client in self._clients if 0 <= client.step <= self._step]
        try:
            batch = next(self._batches)
        except ExternalError as fault:
            self._batches = None
            for client in receivers:
                self._dismiss(client, fault=str(fault))
            return
        self.batches_made += 1
        layout, memory = pack_batch(batch)
        for client in receivers:
            self.batches_sent += self._send(client, {"step": self._step, "layout": layout}, memory)
        os.close(memory)
        self._step += 1
