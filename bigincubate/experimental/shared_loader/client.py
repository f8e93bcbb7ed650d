"""The client of the shared loader, in the process of a module."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
from collections.abc import Generator
from contextlib import closing

from ...data.batch import Batch
from ...errors import DataError
from ...planning.context import PhaseContext
from ...tasks.base import TrainBatches
from . import SERVER_NAME
from .fd_socket import connect, recv_message, send_message
from .packing import unpack_batch

logger = logging.getLogger(__name__)

TIMEOUT = 180.0  # seconds without a message after which a client stops using the server


def use_shared_loader(stream: TrainBatches, context: PhaseContext) -> SharedLoaderClient:
    """Return a stream that gets the batches of ``stream`` from the shared loader: a batch source (`training.hooks`)."""
    env = context.env
    connection = connect(os.environ.pop(SERVER_NAME, ""), env.rank)
    return SharedLoaderClient(stream, connection, batch_digest(context, env.rank, env.world))


def batch_digest(context: PhaseContext, rank: int, world: int) -> str:
    """Return the SHA-256 of everything that a rank's batches depend on."""
    recipe, settings, data = context.recipe, context.settings, context.data
    order = {key: value for key, value in recipe.identity.items() if key.startswith("data.")}
    transform = [settings.task.model_dump(), settings.augment.model_dump(), settings.model.model_dump()]
    share = [settings.train.seed, settings.train.batch_size, rank, world]
    text = json.dumps([data.digest, order, transform, share], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class SharedLoaderClient:
    """A `TrainBatches` that gets batches from the shared loader while it is available.

    If the server is missing, stops, refuses the client or is too slow, the client continues at the same step with its
    own stream. Batches are functions of the step, so they are bitwise identical.

    Args:
        own: The stream to continue with.
        connection: Connection to the server; None if there is no server.
        digest: The `batch_digest` that the server's stream must have.
        timeout: Seconds without a message after which the client stops using the server.
    """

    def __init__(
        self, own: TrainBatches, connection: socket.socket | None, digest: str, *, timeout: float = TIMEOUT
    ) -> None:
        self.steps_per_epoch = own.steps_per_epoch
        self._own, self._connection, self._digest, self._timeout = own, connection, digest, timeout
        if connection is None:
            _report("not found")

    def batches(self, step: int) -> Generator[Batch, None, None]:
        """Yield batches, starting with that of optimizer step ``step``.

        Use one iterator at a time. Only the first uses the server, because the server cannot go back to earlier steps.

        Raises:
            DataError: A shard or an image cannot be read, here or by the server.
        """
        with closing(self._received(step)) as received:
            for batch in received:
                yield batch
                step += 1
        yield from self._own.batches(step)

    def _received(self, step: int) -> Generator[Batch, None, None]:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with connection:
            connection.settimeout(self._timeout)
            try:
                while True:
                    # a request for a step also acknowledges all earlier steps
                    send_message(connection, {"step": step, "digest": self._digest})
                    message, descriptors = recv_message(connection)
                    while "wait" in message:
                        message, descriptors = recv_message(connection)
                    if "fault" in message:
                        raise DataError(message["fault"])
                    if message.get("step") != step:
                        raise ConnectionError(message.get("refused", "it sent another step"))
                    yield unpack_batch(message["layout"], descriptors[0])
                    step += 1
            except TimeoutError:
                _report(f"no batch for {self._timeout:g} s", step)
            except OSError as error:
                _report(str(error), step)


def _report(reason: str, step: int | None = None) -> None:
    since = "" if step is None else f" from step {step}"
    logger.warning("shared loader: %s; using this module's own loader%s", reason, since)
