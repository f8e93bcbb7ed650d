"""Batches that are made once and read by several: modules that train at the same time share one loader.

A `Feeder` makes a rank's batches with the `TrainStream` that each module would have, and hands every one to all its
readers, in memory that they map and the kernel frees with its last reader. It is at most ``DEPTH`` batches ahead of the
slowest. A `FedStream` is a module's end. Whatever happens to the feeder or to another module, it goes on from the very
step with a stream of its own, and a batch is a function of the step: the bits are the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ... import FEED
from ...config import Recipe, Settings
from ...data.dataset import DatasetInfo
from ...data.streams import Batch, TrainStream
from ...errors import EnvironmentFault
from .fd_socket import accept, connect, hear, tell

DEPTH = 4  # batches from the slowest reader's to the newest
PATIENCE = 60.0  # seconds that readers wait for one that is late, or stands still
TICK = 0.2  # seconds from one look at the last call to the next
ALIGNED = 64  # bytes, as torch's own memory is: sums may depend on it


# ------------------------------------------------------------------------------------------------ which stream


def training_stream(
    recipe: Recipe, settings: Settings, info: DatasetInfo, rank: int, world: int
) -> TrainStream | FedStream:
    """A phase's training batches; a co-trained module's from the feeder that the environment names.

    Raises:
        ConfigError: as `TrainStream`.
    """
    own = own_stream(recipe, settings, info, rank, world)
    if (place := os.environ.pop(FEED, None)) is None:
        return own
    return FedStream(own, connect(place, rank), fingerprint(recipe, settings, info, rank, world))


def own_stream(recipe: Recipe, settings: Settings, info: DatasetInfo, rank: int, world: int) -> TrainStream:
    return TrainStream(
        info,
        recipe.data,
        settings.augment,
        img_size=settings.model.img_size,
        seed=settings.train.seed,
        batch_size=settings.train.batch_size,
        rank=rank,
        world=world,
    )


def fingerprint(recipe: Recipe, settings: Settings, info: DatasetInfo, rank: int, world: int) -> str:
    """SHA-256 of all that a rank's batches depend on."""
    order = {key: value for key, value in recipe.identity.items() if key.startswith("data.")}
    look = [settings.augment.model_dump(), settings.model.img_size]
    cut = [settings.train.seed, settings.train.batch_size, rank, world]
    text = json.dumps([info.digest, order, look, cut], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ a reader


class FedStream:
    """A `TrainStream` whose batches somebody else makes, as long as that goes well.

    Args:
        own: the stream to go on with alone. line: to the feeder; None: alone from the beginning.
        digest: the `fingerprint` that the feeder's stream must have.
        patience: seconds without a batch, after which the feeder is given up.
    """

    def __init__(
        self, own: TrainStream, line: socket.socket | None, digest: str, *, patience: float = 3 * PATIENCE
    ) -> None:
        self.steps_per_epoch = own.steps_per_epoch
        self._own, self._line, self._digest, self._patience = own, line, digest, patience
        if line is None:
            _say("nobody is there")

    def batches(self, step: int) -> Generator[Batch, None, None]:
        """Batches from optimizer step ``step`` on. One iterator at a time, and the first alone is fed: the feeder does
        not go back.

        Raises:
            EnvironmentFault: a shard or an image that cannot be read, here or by the feeder.
        """
        with closing(self._fed(step)) as fed:
            for batch in fed:
                yield batch
                step += 1
        yield from self._own.batches(step)

    def _fed(self, step: int) -> Generator[Batch, None, None]:
        line, self._line = self._line, None
        if line is None:
            return
        with line:
            line.settimeout(self._patience)
            try:
                while True:
                    tell(line, {"step": step, "digest": self._digest})  # done with all before it
                    message, memory = hear(line)
                    while "wait" in message:
                        message, memory = hear(line)
                    if "fault" in message:
                        raise EnvironmentFault(message["fault"])
                    if message.get("step") != step:
                        raise ConnectionError(message.get("refused", "it gave another step"))
                    yield unpack(message["columns"], memory[0])
                    step += 1
            except TimeoutError:
                _say(f"no batch for {self._patience:g} s", step)
            except OSError as error:
                _say(str(error), step)


def _say(reason: str, step: int | None = None) -> None:
    since = "" if step is None else f" from step {step} on"
    print(f"shared loader: {reason}; a loader of its own{since}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ the feeder


@dataclass(eq=False)
class _Reader:
    line: socket.socket
    at: int = -1  # the step whose batch it wants or has; before its first word -1
    since: float = field(default_factory=time.monotonic)  # its last word


class Feeder:
    """Gives the batches of ``stream`` to all readers that come to ``listener``.

    It begins once ``readers`` of them have come and said from which step on, or `patience` after the first: at the
    lowest step. A reader whose step is over is refused, and so is one that kept others waiting for all that time.

    Args:
        digest: the stream's `fingerprint`. steps: how many there are in all; none after them is made.

    ``made`` counts batches, ``given`` each batch for each of its readers.
    """

    def __init__(
        self,
        listener: socket.socket,
        stream: TrainStream,
        digest: str,
        *,
        readers: int,
        steps: int,
        patience: float = PATIENCE,
    ) -> None:
        self.stream, self.digest, self.steps, self.patience = stream, digest, steps, patience
        self.made = self.given = 0
        self._readers: list[_Reader] = []
        self._missing = readers  # how many have not come yet
        self._first = math.inf  # when the first one came
        self._last_call = False
        self._step = 0  # of the next batch
        self._reassured = time.monotonic()  # when those that wait were last told so
        self._batches: Generator[Batch, None, None] | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self, last_call: Callable[[], object]) -> None:
        """Until ``last_call()`` (then nobody comes any more), and all readers have left."""
        while True:
            self._last_call = bool(last_call())
            self._listen(0 if self._due() else TICK)
            if self._last_call and not self._readers:
                break
            if self._due():
                self._make()
            else:
                self._dismiss_idle()
                self._reassure()
        if self._batches is not None:
            self._batches.close()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    # ---- who is there

    def _listen(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            if key.data is not None:
                self._hear(key.data)
            elif (line := accept(key.fileobj)) is not None:  # type: ignore[arg-type]
                line.setblocking(False)
                self._readers.append(reader := _Reader(line))
                self._selector.register(line, selectors.EVENT_READ, reader)
                self._missing -= 1
                self._first = min(self._first, reader.since)

    def _hear(self, reader: _Reader) -> None:
        try:
            said, _ = hear(reader.line)
        except OSError:
            self._forget(reader)
            return
        if reader not in self._readers:
            return  # refused, and has not read it yet
        if said["digest"] != self.digest:
            self._dismiss(reader, refused="it makes other batches")
        elif reader.at < 0 and said["step"] < self._step:
            self._dismiss(reader, refused=f"step {said['step']} is over")
        else:
            reader.at, reader.since = said["step"], time.monotonic()

    def _dismiss(self, reader: _Reader, **why: str) -> None:
        """Tell it why it gets no more; it closes the line when it has read that."""
        self._readers.remove(reader)
        self._tell(reader, why)

    def _dismiss_idle(self) -> None:
        """Let those go that have kept others waiting for too long."""
        here = [reader for reader in self._readers if reader.at >= 0]
        waiting = [reader.since for reader in here if reader.at == self._step]
        slow = [reader for reader in here if reader.at <= self._step - DEPTH]
        if waiting and slow:
            since = max(min(waiting), *(reader.since for reader in slow))
            if time.monotonic() - since > self.patience:
                for reader in slow:
                    self._dismiss(reader, refused=f"others waited for {self.patience:g} s")

    def _reassure(self) -> None:
        """Tell those that wait for others that this is all they wait for."""
        if (now := time.monotonic()) - self._reassured > self.patience / 4:
            self._reassured = now
            for reader in [reader for reader in self._readers if reader.at >= self._step]:
                self._tell(reader, {"wait": self._step})

    def _tell(self, reader: _Reader, message: dict[str, Any], *memory: int) -> bool:
        try:
            tell(reader.line, message, *memory)
        except OSError:
            self._forget(reader)
            return False
        return True

    def _forget(self, reader: _Reader) -> None:
        if reader in self._readers:
            self._readers.remove(reader)
        self._selector.unregister(reader.line)
        reader.line.close()

    # ---- batches

    def _due(self) -> bool:
        """Whether a batch is to be made now."""
        steps = [reader.at for reader in self._readers if reader.at >= 0]
        late = self._missing > 0 or len(steps) < len(self._readers)
        if not steps or (late and not self._begun()):
            return False
        return max(self._step, min(steps)) < min(min(steps) + DEPTH, self.steps)

    def _begun(self) -> bool:
        return bool(self.made) or self._last_call or time.monotonic() - self._first > self.patience

    def _make(self) -> None:
        """The next batch, for all that want it."""
        lowest = min(reader.at for reader in self._readers if reader.at >= 0)
        if self._batches is None or lowest > self._step:  # nobody wants what lies between
            if self._batches is not None:
                self._batches.close()
            self._step = max(lowest, self._step)
            self._batches = self.stream.batches(self._step)
        due = [reader for reader in self._readers if 0 <= reader.at <= self._step]
        try:
            batch = next(self._batches)
        except EnvironmentFault as fault:
            self._batches = None
            for reader in due:
                self._dismiss(reader, fault=str(fault))
            return
        self.made += 1
        columns, memory = pack(batch)
        for reader in due:
            self.given += self._tell(reader, {"step": self._step, "columns": columns}, memory)
        os.close(memory)
        self._step += 1


# ------------------------------------------------------------------------------------------------ memory

Columns = dict[str, tuple[str, list[int], int]]  # name -> dtype, shape, byte at which it begins


def pack(batch: Batch) -> tuple[Columns, int]:
    """What a batch has, and a descriptor of new memory that holds it."""
    layout: Columns = {}
    size = 0
    held = {name: column for name in _names() if (column := getattr(batch, name)) is not None}
    for name, column in held.items():
        layout[name] = (str(column.dtype).removeprefix("torch."), list(column.shape), size)
        size += math.ceil(column.nbytes / ALIGNED) * ALIGNED
    descriptor = os.memfd_create("bigincubate-batch")
    os.ftruncate(descriptor, size)
    with open(descriptor, "wb", closefd=False) as memory:  # half as long as through a map, whose pages fault one by one
        for name, column in held.items():
            memory.seek(layout[name][2])
            memory.write(memoryview(column.contiguous().numpy()).cast("B"))
    return layout, descriptor


def unpack(columns: Columns, descriptor: int) -> Batch:
    """The batch, not copied (on a machine with CUDA, into pinned memory); the descriptor is closed. Writing to it would
    change nobody else's."""
    try:
        memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    held = {name: _view(memory, *columns[name]) for name in _names() if name in columns}
    if torch.cuda.is_available():
        held = {name: column.pin_memory() for name, column in held.items()}
    return Batch(**held)


def _view(memory: mmap.mmap, dtype: str, shape: list[int], begin: int) -> Tensor:
    flat = torch.frombuffer(memory, dtype=getattr(torch, dtype), count=math.prod(shape), offset=begin)
    return flat.view(shape)


def _names() -> list[str]:
    return [field.name for field in fields(Batch)]
