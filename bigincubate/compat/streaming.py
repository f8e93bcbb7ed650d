"""A data set of mosaicml-streaming that shares nothing with other jobs, ranks or data sets of the same node.

`streaming` numbers its shared memory from zero without a lock, so jobs that start at the same time collide; it
synchronizes all ranks; and errors in its prefetch threads are lost. To avoid this, these private names are used:
``shared.prefix._each_prefix_int``, ``_parallel_worker_world``, ``_shard_states``, ``_resume``, ``_get_work``,
``_each_sample_id``.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import numpy as np
import torch.distributed
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base import shared
from streaming.base.world import World

LOCAL = 3  # streaming's state of a shard that is ready to read


class IsolatedStreamingDataset(StreamingDataset):
    """A `StreamingDataset` that is independent of other processes; a subclass chooses the order of samples.

    A subclass implements `verify_shard` and, if it is iterated over, `select` and ``__getitem__((sample id, repeat))``.

    Like that of `StreamingDataset`, the constructor reads the index and creates shared memory.

    Args:
        local: Folder of the data set.
        split: Subfolder of the split.
        prefix: Number in the names of the shared memory; no other open data set of this node may use it.
        order: Further arguments of `StreamingDataset`.

    Attributes:
        verified: ``[num_shards]`` uint8, 1 for each shard that has been verified by any worker.
    """

    def __init__(self, local: str, split: str, *, prefix: int, **order: Any) -> None:
        with _as_single_process(prefix):
            super().__init__(local=local, split=split, **order)
        # shared with forked workers and kept over epochs
        self.verified = np.frombuffer(mmap.mmap(-1, self.num_shards), np.uint8)
        # start of the next iteration of persistent workers: epoch, number of samples done in this epoch
        self._start = np.frombuffer(mmap.mmap(-1, 16), np.int64)

    def verify_shard(self, shard_id: int) -> None:
        """Make a shard readable and set ``verified[shard_id]``. Implemented by subclasses; called from any thread."""
        raise NotImplementedError(f"{type(self).__name__} does not implement verify_shard")

    def select(self, first_row: int, worker: int, workers: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows of a worker in an epoch, as positions in the shuffled samples and repeat numbers, each [n].

        Args:
            first_row: Number of rows of the epoch that are done, over all ranks.
            worker: Index of this loader worker.
            workers: Number of loader workers of this rank.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement select")

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Start the next iteration at ``epoch``, after ``sample_in_epoch`` samples (over all ranks).

        streaming's own implementation leaks two open files per epoch.
        """
        self._start[:] = obj["epoch"], obj["sample_in_epoch"]

    @property
    def epoch(self) -> int:
        """The epoch of the current or next iteration."""
        return int(self._start[0])

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        return self.epoch, int(self._start[1])

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Verify a shard before its use, in a thread of streaming, where errors are lost."""
        if not self.verified[shard_id]:
            with suppress(Exception):  # it is raised again when the shard is read
                self.verify_shard(shard_id)
        self._shard_states[shard_id] = LOCAL

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        """Return the sample ids of this worker, selected from the shuffle of the whole epoch."""
        own: World = self._unique_worker_world
        self._parallel_worker_world = World(1, 1, 1, 0)
        shuffled = super()._get_work(epoch, 0)
        positions, self._repeats = self.select(sample_in_epoch, own.worker_of_rank, own.workers_per_rank)
        return shuffled[shuffled >= 0][positions]

    def _each_sample_id(self, it: Any) -> Iterator[tuple[int, int]]:
        """Yield sample ids and repeat numbers.

        If all shards are verified, skip streaming's prefetch threads, which iterate over every sample.
        """
        ids, repeats = it.sample_ids, self._repeats
        if self.verified.all():
            it.non_blocking_exit()
        else:
            ids = super()._each_sample_id(it)
        yield from zip(map(int, ids), map(int, repeats), strict=False)


@contextmanager
def _as_single_process(prefix: int) -> Iterator[None]:
    """Construct a data set as a single process, with shared memory whose numbers start at ``prefix``."""
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with (
        patch.dict(os.environ, one),
        patch.object(torch.distributed, "is_initialized", lambda: False),
        patch.object(shared.prefix, "_each_prefix_int", lambda: itertools.count(prefix)),
    ):
        yield
