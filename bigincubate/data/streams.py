"""Streams of batches. The optimizer step determines the samples of a batch and their views."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from .. import config
from ..compat.streaming_package import StreamingDataLoader
from ..compat.torch import loader_processes
from ..config.seeds import shuffle_seed
from ..errors import ConfigError, ExternalError
from .batch import Batch
from .dataset import DatasetInfo
from .epoch_layout import EpochLayout
from .rng import preserve_rng_state
from .views import Row, SampleTransform, TrainViews, Views, collate
from .workers import PREFETCH_FACTOR, check_shared_memory, free_shared_memory, initialize_worker, limit_wait


class TrainStream:
    """An endless stream of the training batches of one rank.

    The step determines the epoch and the position in it. An epoch is a shuffle of the samples, divided into batches by
    `EpochLayout`. The batches do not depend on the number of workers. (If the number of samples is not divisible by
    ``data.canonical_nodes``, streaming repeats up to that many samples at the end of its shuffle.)

    The constructor opens the shards; see `Shards`.

    Args:
        info: The data set.
        data: The data settings.
        transform: Computes the rows of a batch from samples.
        seed: Seed of the shuffles.
        batch_size: Number of rows of a global batch, over all ranks.
        repeats: Rows per sample (repeated augmentation).
        rank: This rank.
        world: Number of ranks.

    Attributes:
        steps_per_epoch: Number of batches in an epoch.

    Raises:
        ConfigError: If there are too few samples for one batch, or the batch size is not divisible by the world size.
    """

    def __init__(
        self,
        info: DatasetInfo,
        data: config.DataConfig,
        transform: SampleTransform,
        *,
        seed: int,
        batch_size: int,
        repeats: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        samples = info.samples["train"]
        if data.train_samples not in (None, info.epoch):
            raise ConfigError(
                f"data.train_samples = {data.train_samples}, but {info.path} has {info.epoch} training samples"
            )
        if batch_size % world:
            raise ConfigError(
                f"train.batch_size = {batch_size} is not divisible by {world} ranks; use a multiple of {world}"
            )
        self._layout = EpochLayout(samples, batch_size, repeats, rank, world)
        self._layout.check(str(info.path))
        self.steps_per_epoch = self._layout.steps
        share = batch_size // world
        views = TrainViews(
            info,
            transform,
            self._layout,
            remote=data.remote,
            batch_size=share,
            partition_algo="orig",
            num_canonical_nodes=data.canonical_nodes,
            shuffle=True,
            shuffle_algo=data.shuffle,
            shuffle_seed=shuffle_seed(seed),
            shuffle_block_size=data.shuffle_block_size,
        )
        self._workers, self._free_memory = data.workers, free_shared_memory() if data.workers else 0
        # workers are persistent: forking them for each epoch took a sixth of the time of a short epoch
        self._loader = StreamingDataLoader(
            views, **_loader_options(data.workers, transform), batch_size=share, persistent_workers=data.workers > 0
        )

    def batches(self, step: int) -> Generator[Batch, None, None]:
        """Yield batches, starting at optimizer step ``step``. Use one iterator at a time.

        Raises:
            DataError: If a shard or a record cannot be read.
            SystemResourceError: If the batches of all workers do not fit in shared memory.
        """
        checked = False
        while True:
            epoch, done = divmod(step, self.steps_per_epoch)
            self._loader.load_state_dict({"epoch": epoch, "sample_in_epoch": done * self._layout.batch_size})
            with closing(iter(self._loader)) as loaded:
                for rows in islice(_iterate_preserving_rng(loaded, self._limit), self.steps_per_epoch - done):
                    batch = _make_batch(rows, rank=self._layout.rank, world=self._layout.world)
                    if self._workers and not checked:
                        check_shared_memory(self._workers, batch.nbytes, len(batch), self._free_memory)
                        checked = True
                    yield batch
                    step += 1
            if step % self.steps_per_epoch:
                raise RuntimeError(f"the loader ended at step {step}, before the end of epoch {epoch}")

    def _limit(self) -> AbstractContextManager[None]:
        return limit_wait(lambda: loader_processes(self._loader._iterator)) if self._workers else nullcontext()


class EvalStream:
    """One rank's share of a split, each sample exactly once: rank r of W gets samples r, r + W, ..., without padding.

    The constructor opens the shards; see `Shards`.

    Args:
        info: The data set.
        split: ``"train"`` or ``"val"``.
        transform: Computes the rows of a batch, one per sample.
        batch_size: Number of rows in a batch of this rank; the last batch may be smaller.
        rank: This rank.
        world: Number of ranks.
        workers: Number of worker processes.
        remote: URL from which missing shards are downloaded.
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
        self._loader = DataLoader(views, **_loader_options(workers, transform), batch_size=batch_size)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches, in the order of the sample ids.

        Raises:
            DataError: If a shard or a record cannot be read.
        """
        loaded = iter(self._loader)
        limit = partial(limit_wait, partial(loader_processes, loaded)) if self._loader.num_workers else nullcontext
        for number in range(len(self)):
            with limit():
                rows = next(loaded)
            yield _make_batch(rows, rank=self._rank, world=self._world, first=number * self._batch_size)


# ------------------------------------------------------------------------------------------------ rows


def _iterate_preserving_rng(loaded: Iterator[Any], limit: Callable[[], AbstractContextManager[None]]) -> Iterator[Any]:
    """Yield the same items, without changing the state of the global generators while an item is loaded.

    Args:
        loaded: The items.
        limit: Limits the time to load an item.
    """
    while True:
        with preserve_rng_state(), limit():
            rows = next(loaded, None)
        if rows is None:
            return
        yield rows


def _make_batch(rows: tuple[Any, Any], *, rank: int, world: int, first: int = 0) -> Batch:
    ids, columns = rows
    if isinstance(columns, ExternalError):
        raise columns
    index = torch.arange(first, first + len(ids))
    return Batch(columns, ids, index * world + rank, index)


def _loader_options(workers: int, transform: SampleTransform) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "collate_fn": partial(collate, transform),
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # without one, each epoch would draw from the global generator
        "multiprocessing_context": "fork" if workers else None,  # workers share the memory of the main process
        "prefetch_factor": PREFETCH_FACTOR if workers else None,
        "worker_init_fn": initialize_worker,
    }
