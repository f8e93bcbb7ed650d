"""Shards -> batches. Which samples a batch holds, and what they look like, is a function of the optimizer step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import Any

import torch
from streaming import StreamingDataLoader
from torch import Tensor
from torch.utils.data import DataLoader

from .. import config
from ..errors import ConfigError, EnvironmentFault
from ..seeds import shuffle_seed
from ..tasks.image_classification.augment import set_aside
from ..tasks.image_classification.views import EvalViews, Finish, Row, TrainViews, collate, stack
from .dataset import DatasetInfo


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch, n rows."""

    images: Tensor  # [n, 3, H, W] float32; with parameters uint8
    labels: Tensor  # [n] int64
    ids: Tensor  # [n] int64: of the samples in their split
    positions: Tensor  # [n] int64: p in the global batch; view v of its sample j has p = j * R + v
    local: Tensor  # [n] int64: which of the rank's samples, i; on rank r of W it is j = i * W + r
    parameters: Tensor | None = None  # [n, 16] float32: what the device has to do; None: nothing, images are finished

    def __len__(self) -> int:
        return len(self.labels)

    def micro(self, index: int, count: int) -> Batch:
        """The ``index``-th of ``count`` micro-batches: the samples i with i mod count = index, all views."""
        if count == 1:
            return self
        rows = (self.local % count == index).nonzero().squeeze(1)
        return self._each(lambda column: column[rows])

    def to(self, device: torch.device | str) -> Batch:
        """A copy on ``device``; from pinned memory it does not wait."""
        return self._each(lambda column: column.to(device, non_blocking=True))

    def first(self, count: int) -> Batch:
        """Its first rows."""
        return self._each(lambda column: column[:count])

    def _each(self, act: Callable[[Tensor], Tensor]) -> Batch:
        columns = (getattr(self, field.name) for field in fields(self))
        return Batch(*(act(column) for column in columns if column is not None))


class TrainStream:
    """Training batches of one rank, for ever.

    Epoch and position follow from the step. An epoch has floor(N / (batch_size / R)) batches: a shuffle of the N
    samples whose tail is left out. The batches do not depend on workers, and on the world only by who gets which rows:
    rank r gets the samples j with j mod W = r. (With several `canonical_nodes` that do not divide N, streaming repeats
    up to that many samples at the end of its shuffle.)

    Args:
        batch_size: global, over all ranks and views. rank, world: this rank, of how many.

    Raises:
        ConfigError: too few samples for one batch, or a batch that ranks cannot share evenly.
    """

    def __init__(
        self,
        info: DatasetInfo,
        data: config.Data,
        augment: config.Augment,
        *,
        img_size: int,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        samples = info.samples["train"]
        if data.train_samples not in (None, info.epoch):
            raise ConfigError(f"data.train_samples = {data.train_samples}, but {info.path} holds {info.epoch}")
        self._distinct = batch_size // augment.repeats  # samples of a global batch
        if self._distinct % world:
            raise ConfigError(
                f"train.batch_size / augment.repeats = {self._distinct} cannot be shared evenly by {world} ranks"
            )
        self.steps_per_epoch = samples // self._distinct
        if not self.steps_per_epoch:
            raise ConfigError(
                f"a batch takes {self._distinct} samples, {info.path} holds {samples}: lower train.batch_size"
            )
        self._rank, self._world, self._repeats = rank, world, augment.repeats
        share = self._distinct // world
        views = TrainViews(
            info,
            augment,
            img_size,
            seed=seed,
            remote=data.remote,
            rank=rank,
            world=world,
            batch_size=share,
            partition_algo="orig",
            num_canonical_nodes=data.canonical_nodes,
            shuffle=True,
            shuffle_algo=data.shuffle,
            shuffle_seed=shuffle_seed(seed),
            shuffle_block_size=data.shuffle_block_size,
        )
        # workers stay: to fork them anew costs a short epoch a sixth of its time
        self._loader = StreamingDataLoader(
            views, **_loading(data.workers, views.finish), batch_size=share, persistent_workers=data.workers > 0
        )

    def batches(self, step: int) -> Generator[Batch, None, None]:
        """Batches from optimizer step ``step`` on. One iterator at a time.

        Raises:
            EnvironmentFault: a shard or an image that cannot be read.
        """
        while True:
            epoch, done = divmod(step, self.steps_per_epoch)
            self._loader.load_state_dict({"epoch": epoch, "sample_in_epoch": done * self._distinct})
            with closing(iter(self._loader)) as loaded:
                for rows in islice(_set_aside(loaded), self.steps_per_epoch - done):
                    yield _batch(rows, rank=self._rank, world=self._world, repeats=self._repeats)
                    step += 1
            if step % self.steps_per_epoch:
                raise RuntimeError(f"the loader ended before epoch {epoch} did, at step {step}")


def make_train_stream(
    recipe: config.Recipe, settings: config.Settings, info: DatasetInfo, rank: int, world: int
) -> TrainStream:
    """Return the training batches of a phase on one rank.

    Raises:
        ConfigError: As `TrainStream`.
    """
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


class EvalStream:
    """The samples of a split, each exactly once: rank r of W gets r, r + W, … and no padding.

    Args:
        batch_size: rows this rank loads at once; the last batch may be smaller.
    """

    def __init__(
        self,
        info: DatasetInfo,
        split: str,
        augment: config.Augment,
        *,
        img_size: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        remote: str | None = None,
    ) -> None:
        self._rank, self._world, self._batch_size = rank, world, batch_size
        ids = range(rank, info.samples[split], world)
        views = EvalViews(info, split, augment, img_size, ids, remote=remote)
        self._loader: DataLoader[Row | EnvironmentFault] = DataLoader(
            views, **_loading(workers, stack), batch_size=batch_size
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Batches in the order of ids.

        Raises:
            EnvironmentFault: a shard or an image that cannot be read.
        """
        for number, rows in enumerate(self._loader):
            yield _batch(rows, rank=self._rank, world=self._world, first=number * self._batch_size)


# ------------------------------------------------------------------------------------------------ rows


def _set_aside(loaded: Iterator[Any]) -> Iterator[Any]:
    """The same. What it draws from the global generators between two batches is not seen outside."""
    while True:
        with set_aside():
            rows = next(loaded, None)
        if rows is None:
            return
        yield rows


def _batch(rows: tuple[Any, ...], *, rank: int, world: int, repeats: int = 1, first: int = 0) -> Batch:
    if isinstance(rows[1], EnvironmentFault):
        raise rows[1]
    (images, *more), labels, ids = rows
    local = torch.arange(first, first + len(ids)).repeat_interleave(repeats)
    positions = (local * world + rank) * repeats + torch.arange(repeats).repeat(len(ids))
    return Batch(images, labels.repeat_interleave(repeats), ids.repeat_interleave(repeats), positions, local, *more)


def _loading(workers: int, finish: Finish) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "collate_fn": partial(collate, finish),
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # or each epoch would draw from the global one
        "multiprocessing_context": "fork" if workers else None,  # workers share memory with us
        "worker_init_fn": _quiet,
    }


def _quiet(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers
