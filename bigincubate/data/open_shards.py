"""Open shards: a process keeps a limited number of shard files open, so that most samples need no open and close."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import NamedTuple

MAX_OPEN_SHARDS = 512  # per split and process; the samples of a shuffle block are in about as many shards
OPEN_FILES_SHARE = 4  # a split keeps at most this fraction of the allowed open files of a process (`ulimit -n`)


class FileStamp(NamedTuple):
    """What changes when a file is written or replaced.

    Attributes:
        size: Size in bytes.
        modified: Modification time in nanoseconds.
        inode: Number of the file in its file system.
    """

    size: int
    modified: int
    inode: int

    @classmethod
    def of(cls, file: Path | str | int) -> FileStamp:
        """Return the stamp of a file, given its path or descriptor.

        Raises:
            OSError: The file is missing or cannot be read.
        """
        status = os.stat(file)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class OpenShard:
    """A shard that is open for reading. It is closed when the last reference to it is gone.

    Reads have no common position, so forked processes and threads may share it.

    Attributes:
        stamp: The stamp of the file that is open, even if its path has another file by now.
    """

    def __init__(self, file: str) -> None:
        self._descriptor = -1
        self._descriptor = os.open(file, os.O_RDONLY)
        self.stamp = FileStamp.of(self._descriptor)

    def read(self, row: int) -> bytes:
        """Return the bytes of a record.

        Raises:
            ValueError: The record is not inside the file.
            OSError: The file cannot be read.
        """
        ends = os.pread(self._descriptor, 8, 4 * (1 + row))
        begin, end = int.from_bytes(ends[:4], "little"), int.from_bytes(ends[4:], "little")
        if not begin <= end <= self.stamp.size:
            raise ValueError(f"bytes {begin} to {end} of a file of {self.stamp.size} bytes")
        return os.pread(self._descriptor, end - begin, begin)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class OpenShards:
    """The shards that were read last, by number."""

    def __init__(self) -> None:
        self.limit = max_open_shards()
        self._open: dict[int, OpenShard] = {}  # the one that was read last is at the end

    def __len__(self) -> int:
        return len(self._open)

    def get(self, number: int) -> OpenShard | None:
        """Return an open shard, or None if it is not open."""
        shard = self._open.pop(number, None)
        if shard is not None:
            self._open[number] = shard
        return shard

    def add(self, number: int, shard: OpenShard) -> None:
        """Keep a shard open, and close the one that was not read for the longest time if there are too many."""
        self._open[number] = shard
        if len(self._open) > self.limit:
            del self._open[next(iter(self._open))]

    def close(self, number: int) -> None:
        """Close a shard."""
        self._open.pop(number, None)


def max_open_shards() -> int:
    """Return the number of shards of a split that this process may keep open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MAX_OPEN_SHARDS
    return max(1, min(MAX_OPEN_SHARDS, limit // OPEN_FILES_SHARE))
