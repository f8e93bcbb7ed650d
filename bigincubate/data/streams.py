"""Shards -> batches. Which samples a batch holds, and what they look like, is a function of the optimizer step."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import torch
from streaming import StreamingDataLoader
from torch.utils.data import DataLoader

from .. import config
from ..errors import ConfigError, DataError, ExternalError
from ..seeds import shuffle_seed
from .batch import Batch
from .dataset import DatasetInfo
from .rng import preserve_rng_state
from .views import EvalViews, Row, SampleTransform, TrainViews, collate


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
        data: config.DataConfig,
        transform: SampleTransform,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        samples = info.samples["train"]
        if data.train_samples not in (None, info.epoch):
            raise ConfigError(f"data.train_samples = {data.train_samples}, but {info.path} holds {info.epoch}")
        self._distinct = batch_size // transform.views_per_sample  # samples of a global batch
        if self._distinct % world:
            raise ConfigError(
                f"train.batch_size / augment.repeated_aug = {self._distinct} cannot be shared evenly by {world} ranks"
            )
        self.steps_per_epoch = samples // self._distinct
        if not self.steps_per_epoch:
            raise ConfigError(
                f"a batch takes {self._distinct} samples, {info.path} holds {samples}: lower train.batch_size"
            )
        self._rank, self._world, self._views_per_sample = rank, world, transform.views_per_sample
        share = self._distinct // world
        views = TrainViews(
            info,
            transform,
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
            views, **_loading(data.workers, transform), batch_size=share, persistent_workers=data.workers > 0
        )

    def batches(self, step: int) -> Generator[Batch, None, None]:
        """Batches from optimizer step ``step`` on. One iterator at a time.

        Raises:
            DataError: a shard or an image that cannot be read.
        """
        while True:
            epoch, done = divmod(step, self.steps_per_epoch)
            self._loader.load_state_dict({"epoch": epoch, "sample_in_epoch": done * self._distinct})
            with closing(iter(self._loader)) as loaded:
                for rows in islice(_set_aside(loaded), self.steps_per_epoch - done):
                    yield _batch(rows, rank=self._rank, world=self._world, views_per_sample=self._views_per_sample)
                    step += 1
            if step % self.steps_per_epoch:
                raise RuntimeError(f"the loader ended before epoch {epoch} did, at step {step}")


class EvalStream:
    """The samples of a split, each exactly once: rank r of W gets r, r + W, … and no padding.

    Args:
        batch_size: rows this rank loads at once; the last batch may be smaller.
    """

    def __init__(
        self,
        info: DatasetInfo,
        split: str,
        transform: SampleTransform,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        remote: str | None = None,
    ) -> None:
        self._rank, self._world, self._batch_size = rank, world, batch_size
        ids = range(rank, info.samples[split], world)
        views = EvalViews(info, split, transform, ids, remote=remote)
        self._loader: DataLoader[Row | ExternalError] = DataLoader(
            views, **_loading(workers, transform), batch_size=batch_size
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Batches in the order of ids.

        Raises:
            DataError: a shard or an image that cannot be read.
        """
        for number, rows in enumerate(self._loader):
            yield _batch(rows, rank=self._rank, world=self._world, first=number * self._batch_size)


# ------------------------------------------------------------------------------------------------ rows


def _set_aside(loaded: Iterator[Any]) -> Iterator[Any]:
    """The same. What it draws from the global generators between two batches is not seen outside."""
    while True:
        with preserve_rng_state():
            rows = next(loaded, None)
        if rows is None:
            return
        yield rows


def _batch(rows: tuple[Any, Any], *, rank: int, world: int, views_per_sample: int = 1, first: int = 0) -> Batch:
    columns, ids = rows
    if isinstance(ids, DataError):
        raise ids
    local = torch.arange(first, first + len(ids)).repeat_interleave(views_per_sample)
    positions = (local * world + rank) * views_per_sample + torch.arange(views_per_sample).repeat(len(ids))
    return Batch(columns, ids.repeat_interleave(views_per_sample), positions, local)


def _loading(workers: int, transform: SampleTransform) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "collate_fn": partial(collate, transform),
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # or each epoch would draw from the global one
        "multiprocessing_context": "fork" if workers else None,  # workers share memory with us
        "worker_init_fn": _quiet,
    }


def _quiet(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers
