"""A data set of mosaicml-streaming that shares nothing with other jobs, ranks or data sets of the same node.

`streaming` numbers its shared memory from zero without a lock, so jobs that start at the same time collide; it
synchronizes all ranks; errors in its prefetch threads are lost; it lists every folder of the data; each worker
computes the order of an epoch and keeps its part; its threads keep running, with the data set in memory, if iteration
stops early; and the shared memory stays open until the process ends. To avoid this, these private names are used:
``shared.prefix._each_prefix_int``, ``shared.memory.atexit``, ``_shard_states``, ``_resume``, ``_get_work``,
``_each_sample_id``, ``_iterator``.
"""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import torch.distributed
from numpy.typing import NDArray

from .malloc import return_freed_memory
from .streaming_package import Stream, StreamingDataset, World, generate_work, shared

LOCAL = 3  # streaming's state of a shard that is ready to read


class SelectedRows(Protocol):
    """The rows of an epoch that one loader worker loads, in order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return the position of a row in the shuffled samples, and its repeat number."""


class IsolatedStreamingDataset(StreamingDataset):
    """A `StreamingDataset` that is independent of other processes; a subclass chooses the order of samples.

    A subclass implements `verify_shard` and, if it is iterated over, `select` and ``__getitem__((sample id, repeat))``.

    The order of an epoch is computed once, in the process that calls `load_state_dict`, and forked workers share it.
    Therefore the memory of a worker does not depend on the number of samples.

    Like that of `StreamingDataset`, the constructor reads the index and creates shared memory.

    Args:
        local: Folder of the data set.
        split: Subfolder of the split.
        prefix: Number in the names of the shared memory; no other open data set of this node may use it.
        release: Called after the shared memory was removed: when this object is gone, or at the exit of the process.
        order: Further arguments of `StreamingDataset`.

    Attributes:
        verified: ``[num_shards]`` uint8, 1 for each shard that has been verified by any worker.
    """

    def __init__(
        self, local: str, split: str, *, prefix: int, release: Callable[[], None] = lambda: None, **order: Any
    ) -> None:
        cleanups: list[Callable[[], None]] = []
        weakref.finalize(self, _clean_up, cleanups, release, os.getpid())
        with _as_single_process(prefix, cleanups.append):
            super().__init__(streams=[_UnlistedStream(local=local, split=split)], **order)
        # shared with forked workers and kept over epochs
        self.verified = _shared_array(self.num_shards, np.uint8)
        # start of the next iteration of persistent workers: epoch, number of samples done in this epoch
        self._start = _shared_array(2, np.int64)
        # sample ids in the order of an epoch; streaming repeats one if a canonical node has fewer than the others
        longest = self.num_samples + (self.num_canonical_nodes or 1)
        self._order = _shared_array(longest, np.min_scalar_type(self.num_samples))
        self._order_of = _shared_array(2, np.int64)  # 1 + the epoch of this order; its length

    def verify_shard(self, shard_id: int) -> None:
        """Make a shard readable and set ``verified[shard_id]``. Implemented by subclasses; called from any thread."""
        # not abstract: streaming's class is no ABC, and a test of the order alone reads no shard
        raise NotImplementedError(f"{type(self).__name__} does not implement verify_shard")

    def select(self, first_row: int, worker: int, workers: int) -> SelectedRows:
        """Return the rows of a worker in an epoch.

        Args:
            first_row: Number of rows of the epoch that are done, over all ranks.
            worker: Index of this loader worker.
            workers: Number of loader workers of this rank.
        """
        # not abstract: only a data set that is iterated has an order; evaluation reads `Shards` by index
        raise NotImplementedError(f"{type(self).__name__} does not implement select")

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Start the next iteration at ``epoch``, after ``sample_in_epoch`` samples (over all ranks).

        streaming's own implementation leaks two open files per epoch.
        """
        self._start[:] = obj["epoch"], obj["sample_in_epoch"]
        self._compute_order()

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples of an epoch. If iteration stops early, the threads that read ahead end soon after.

        They are not waited for, because a thread may be in the middle of a download.
        """
        try:
            yield from super().__iter__()
        finally:
            if hasattr(self, "_iterator"):  # there is none if the epoch was empty
                self._iterator.non_blocking_exit()

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

    def _compute_order(self) -> None:
        """Compute the shuffle of the whole epoch, unless this or another process has done it."""
        if self._order_of[0] == 1 + self.epoch:
            return
        order = generate_work(self.batching_method, self, World(1, 1, 1, 0), self.epoch, 0).ravel()
        order = order[order >= 0]
        self._order[: len(order)] = order
        self._order_of[:] = 1 + self.epoch, len(order)
        del order
        return_freed_memory()  # it took about 100 bytes per sample

    def _get_work(self, epoch: int, sample_in_epoch: int) -> _SelectedSamples:
        """Return the sample ids of this worker, selected from the shuffle of the whole epoch."""
        self._compute_order()
        own: World = self._unique_worker_world
        rows = self.select(sample_in_epoch, own.worker_of_rank, own.workers_per_rank)
        return _SelectedSamples(self._order[: self._order_of[1]], rows)

    def _each_sample_id(self, it: Any) -> Iterator[tuple[int, int]]:
        """Yield sample ids and repeat numbers.

        If all shards are verified, skip streaming's prefetch threads, which iterate over every sample.
        """
        samples: _SelectedSamples = it.sample_ids
        ready: Iterable[int] = range(it.total)
        if self.verified.all():
            it.non_blocking_exit()
        else:
            ready = (index for index, _ in enumerate(super()._each_sample_id(it)))
        yield from map(samples.with_repeat, ready)


class _SelectedSamples:
    """The sample ids of one worker, looked up when they are needed."""

    def __init__(self, order: NDArray[Any], rows: SelectedRows) -> None:
        self._order, self._rows = order, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> int:
        return self.with_repeat(index)[0]

    def with_repeat(self, index: int) -> tuple[int, int]:
        """Return the sample id of a row, and its repeat number."""
        position, repeat = self._rows[index]
        return int(self._order[position]), repeat


class _UnlistedStream(Stream):
    """A stream that does not list its folder to see which shards exist: `prepare_shard` finds out."""

    def set_up_local(self, shards: list[Any], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Leave every shard marked as missing."""


def _shared_array(length: int, dtype: Any) -> NDArray[Any]:
    """Return an array of zeros that forked processes share."""
    return np.frombuffer(mmap.mmap(-1, max(1, length * np.dtype(dtype).itemsize)), dtype, length)


def _clean_up(cleanups: list[Callable[[], None]], release: Callable[[], None], owner: int) -> None:
    """Close and remove the shared memory of a data set, in the process that created it."""
    if os.getpid() == owner:
        for call in (*reversed(cleanups), release):
            call()


@contextmanager
def _as_single_process(prefix: int, register: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Construct a data set as a single process.

    Args:
        prefix: The first number in the names of its shared memory.
        register: Gets the functions that remove the shared memory, instead of `atexit.register`.
    """
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with (
        patch.dict(os.environ, one),
        patch.object(torch.distributed, "is_initialized", lambda: False),
        patch.object(shared.prefix, "_each_prefix_int", lambda: itertools.count(prefix)),
        patch.object(shared.memory, "atexit", SimpleNamespace(register=register)),
    ):
        yield
