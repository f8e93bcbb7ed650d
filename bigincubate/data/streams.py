"""Streams of batches. The samples of a batch and their views are a function of the optimizer step."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import torch
from streaming import StreamingDataLoader
from torch.utils.data import DataLoader, Subset

from .. import config
from ..errors import ConfigError, ExternalError
from ..seeds import shuffle_seed
from .batch import Batch
from .dataset import DatasetInfo
from .rng import preserve_rng_state
from .views import Row, SampleTransform, Views, collate


class TrainStream:
    """An endless stream of the training batches of one rank.

    The step determines epoch and position. An epoch has floor(N / (batch_size / R)) batches, for N samples with R views
    each: a shuffle of the samples without its tail. The batches do not depend on the number of workers; rank r of W
    gets the samples j with j mod W = r. (With several `canonical_nodes` that do not divide N, streaming repeats up to
    that many samples at the end of its shuffle.)

    The constructor opens the shards, as `Shards` does.

    Args:
        info: The data set.
        data: The data settings.
        transform: Makes the rows of a batch.
        seed: The seed of the shuffles.
        batch_size: Number of rows of a global batch, over all ranks and views.
        rank: This rank.
        world: Number of ranks.

    Attributes:
        steps_per_epoch: Number of batches in an epoch.

    Raises:
        ConfigError: If there are too few samples for one batch, or the batch cannot be divided evenly by the ranks.
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
        views = Views(
            info,
            "train",
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
        # persistent: forking workers for each epoch costs a sixth of the time of a short epoch
        self._loader = StreamingDataLoader(
            views, **_loading(data.workers, transform), batch_size=share, persistent_workers=data.workers > 0
        )

    def batches(self, step: int) -> Generator[Batch, None, None]:
        """Yield batches from optimizer step ``step`` on. Use one iterator at a time.

        Raises:
            DataError: If a shard or a record cannot be read.
        """
        while True:
            epoch, done = divmod(step, self.steps_per_epoch)
            self._loader.load_state_dict({"epoch": epoch, "sample_in_epoch": done * self._distinct})
            with closing(iter(self._loader)) as loaded:
                for rows in islice(_iterate_preserving_rng(loaded), self.steps_per_epoch - done):
                    yield _batch(rows, rank=self._rank, world=self._world, views_per_sample=self._views_per_sample)
                    step += 1
            if step % self.steps_per_epoch:
                raise RuntimeError(f"the loader ended at step {step}, before the end of epoch {epoch}")


class EvalStream:
    """One rank's share of a split, each sample exactly once: rank r of W gets samples r, r + W, ..., without padding.

    The constructor opens the shards, as `Shards` does.

    Args:
        info: The data set.
        split: ``"train"`` or ``"val"``.
        transform: Makes the rows of a batch, one per sample.
        batch_size: Number of rows in a batch of this rank; the last batch may be smaller.
        rank: This rank.
        world: Number of ranks.
        workers: Number of worker processes.
        remote: A URL from which missing shards are downloaded.
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
        views: Subset[Row | ExternalError] = Subset(Views(info, split, transform, remote=remote), ids)
        self._loader = DataLoader(views, **_loading(workers, transform), batch_size=batch_size)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches in the order of sample ids.

        Raises:
            DataError: If a shard or a record cannot be read.
        """
        for number, rows in enumerate(self._loader):
            yield _batch(rows, rank=self._rank, world=self._world, first=number * self._batch_size)


# ------------------------------------------------------------------------------------------------ rows


def _iterate_preserving_rng(loaded: Iterator[Any]) -> Iterator[Any]:
    """Yield the same items. Random draws made while an item is loaded do not change the global generators."""
    while True:
        with preserve_rng_state():
            rows = next(loaded, None)
        if rows is None:
            return
        yield rows


def _batch(rows: tuple[Any, Any], *, rank: int, world: int, views_per_sample: int = 1, first: int = 0) -> Batch:
    ids, columns = rows
    if isinstance(columns, ExternalError):
        raise columns
    local = torch.arange(first, first + len(ids)).repeat_interleave(views_per_sample)
    positions = (local * world + rank) * views_per_sample + torch.arange(views_per_sample).repeat(len(ids))
    return Batch(columns, ids.repeat_interleave(views_per_sample), positions, local)


def _loading(workers: int, transform: SampleTransform) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "collate_fn": partial(collate, transform),
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # or each epoch would draw from the global one
        "multiprocessing_context": "fork" if workers else None,  # workers share the memory of the main process
        "worker_init_fn": _ignore_interrupt,
    }


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C and ends its workers
