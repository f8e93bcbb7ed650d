"""mosaicml-streaming: a data set that shares nothing with other jobs, ranks or data sets of the same node.

`streaming` numbers its shared memory from zero without a lock, so that jobs that start together collide; it couples all
ranks; and it looks ahead with threads whose errors are lost. The private parts that this needs are used here only:
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

LOCAL = 3  # streaming's state of a shard that can be read


class IsolatedStreamingDataset(StreamingDataset):
    """A `StreamingDataset` of one rank, independent of every other process.

    Position j of an epoch belongs to rank j mod ``world``; neither the number of nodes nor that of workers matters.
    A subclass says with `verify_shard` what makes a shard readable.

    Args:
        local: folder of the data set.
        split: subfolder of the split.
        prefix: number from which shared memory is named; no other live data set of this node may use it.
        rank: whose samples are iterated over.
        world: number of ranks.
        order: further arguments of `StreamingDataset`.
    """

    def __init__(self, local: str, split: str, *, prefix: int, rank: int = 0, world: int = 1, **order: Any) -> None:
        with _as_single_process(prefix):
            super().__init__(local=local, split=split, **order)
        self._parallel_rank_world = World(1, world, 1, rank)
        # Which shards are verified: memory that forked workers share with each other and with later epochs.
        self.verified = np.frombuffer(mmap.mmap(-1, self.num_shards), np.uint8)
        # Where the next iteration begins, for workers that outlive an epoch: the epoch, and samples done in it.
        self._begin = np.frombuffer(mmap.mmap(-1, 16), np.int64)

    def verify_shard(self, shard_id: int) -> None:
        """Make a shard readable, and set ``verified[shard_id]``; it is called from a thread as well."""
        raise NotImplementedError

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Begin the next iteration at ``epoch``, after ``sample_in_epoch`` samples (over all ranks).

        streaming's own implementation leaves two open files per epoch.
        """
        self._begin[:] = obj["epoch"], obj["sample_in_epoch"]

    @property
    def epoch(self) -> int:
        """The epoch that is iterated over."""
        return int(self._begin[0])

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        return self.epoch, int(self._begin[1])

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Verify a shard ahead of the reader, in a thread of streaming's where an error would be lost."""
        if not self.verified[shard_id]:
            with suppress(Exception):  # the reader meets it again, and raises
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
