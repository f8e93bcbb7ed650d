"""A data set of mosaicml-streaming that shares nothing with other jobs, ranks or data sets of the same node.

`streaming` numbers its shared memory from zero without a lock, so that jobs that start at the same time collide; it
couples all ranks; and its threads that load ahead lose errors. Its private names that are used to avoid this:
``shared.prefix._each_prefix_int``, ``_parallel_rank_world``, ``_shard_states``, ``_resume``, ``_each_sample_id``.
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
from streaming import StreamingDataset
from streaming.base import shared
from streaming.base.world import World

LOCAL = 3  # streaming's state of a shard that is ready to read


class IsolatedStreamingDataset(StreamingDataset):
    """A `StreamingDataset` of one rank, independent of every other process.

    Position j of an epoch belongs to rank j mod ``world``; neither the number of nodes nor that of workers matters.
    A subclass implements `verify_shard`.

    The constructor reads the index and creates shared memory: `StreamingDataset` is designed so.

    Args:
        local: Folder of the data set.
        split: Subfolder of the split.
        prefix: Number that names the shared memory; no other live data set of this node may use it.
        rank: The rank whose samples are iterated over.
        world: Number of ranks.
        order: Further arguments of `StreamingDataset`.

    Attributes:
        verified: ``[num_shards]`` uint8, 1 for each shard that has been verified by any worker.
    """

    def __init__(self, local: str, split: str, *, prefix: int, rank: int = 0, world: int = 1, **order: Any) -> None:
        with _as_single_process(prefix):
            super().__init__(local=local, split=split, **order)
        self._parallel_rank_world = World(1, world, 1, rank)
        # shared by forked workers, and kept over epochs
        self.verified = np.frombuffer(mmap.mmap(-1, self.num_shards), np.uint8)
        # where persistent workers begin the next iteration: epoch, number of samples done in it
        self._begin = np.frombuffer(mmap.mmap(-1, 16), np.int64)

    def verify_shard(self, shard_id: int) -> None:
        """Make a shard readable and set ``verified[shard_id]``. Also called from threads. Subclasses implement it."""
        raise NotImplementedError(f"{type(self).__name__} does not implement verify_shard")

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Begin the next iteration at ``epoch``, after ``sample_in_epoch`` samples (over all ranks).

        streaming's own implementation leaves two open files per epoch.
        """
        self._begin[:] = obj["epoch"], obj["sample_in_epoch"]

    @property
    def epoch(self) -> int:
        """The epoch of the current or next iteration."""
        return int(self._begin[0])

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        return self.epoch, int(self._begin[1])

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Verify a shard ahead of its use, in a thread of streaming, where an error would be lost."""
        if not self.verified[shard_id]:
            with suppress(Exception):  # raised when the shard is read
                self.verify_shard(shard_id)
        self._shard_states[shard_id] = LOCAL

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        """Skip streaming's threads, which look ahead at every sample, where all shards are verified."""
        if not self.verified.all():
            return (yield from super()._each_sample_id(it))
        it.non_blocking_exit()
        yield from map(int, it.sample_ids[it.sample_ids >= 0])


@contextmanager
def _as_single_process(prefix: int) -> Iterator[None]:
    """Construct a data set as a world of one process, with shared memory named from ``prefix`` on."""
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with (
        patch.dict(os.environ, one),
        patch.object(torch.distributed, "is_initialized", lambda: False),
        patch.object(shared.prefix, "_each_prefix_int", lambda: itertools.count(prefix)),
    ):
        yield
