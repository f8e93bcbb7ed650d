"""One split of a prepared data set as a `StreamingDataset` that verifies its files and is independent of other jobs.

`streaming` has these problems on a machine with several jobs, which this module solves:

- It numbers its shared memory from zero without a lock, so jobs that start at the same time collide, and it picks up
  the memory of killed jobs. Here each data set has its own number (`shared_memory.claim_memory_prefix`).
- It synchronizes all ranks. Here each rank is independent and has its own workers: no barrier, no deadlock.
- It reads files without checking them. Here a shard is hashed before it is first read (`verification`).
- It opens a file for each sample. Here a process keeps a limited number of shards open (`open_shards`).
- When a download fails, it hangs or ends the epoch early. Here the reader raises an error.
"""

from __future__ import annotations

import errno
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..compat.streaming import IsolatedStreamingDataset
from ..errors import DataError
from ..files import unreadable_error
from .dataset import REPREPARE_HINT, DatasetInfo
from .file_locks import file_lock, runtime_dir
from .open_shards import FileStamp, OpenShard, OpenShards
from .remote import check_hash
from .shared_memory import claim_memory_prefix
from .stored_records import RecordReader
from .stored_shards import StoredShards
from .verification import VerifiedShards

DECODED_CACHE_BYTES = 64 << 20  # per process; a split that needs more is not kept decoded
PER_IMAGE_OVERHEAD = 2048  # bytes, approximately: overhead of Pillow, torch and Python


class RecordDecoder(Protocol):
    """Decodes records of one kind into samples in memory."""

    def decode(self, record: dict[str, Any]) -> Any:
        """Return the sample of a record.

        Args:
            record: A value for each column.

        Raises:
            ValueError: If the record is not valid; the message says why.
        """

    def compact(self, sample: Any) -> tuple[Any, int]:
        """Return a copy of a sample with only what training uses, to keep in memory, and its size in bytes."""


class Shards(IsolatedStreamingDataset):
    """The samples of one split, verified and decoded, by sample index.

    Like that of `StreamingDataset`, the constructor reads the index of the split and creates shared memory.

    Args:
        info: The data set.
        split: ``"train"`` or ``"val"``.
        decoder: Decodes the records.
        remote: URL from which missing shards are downloaded.
        order: Further arguments of `StreamingDataset`.

    Attributes:
        memory_prefix: The number in the names of the shared memory.

    Raises:
        SystemResourceError: If the folder for locks belongs to another user.
    """

    def __init__(
        self,
        info: DatasetInfo,
        split: str,
        decoder: RecordDecoder,
        *,
        remote: str | None = None,
        **order: Any,
    ) -> None:
        self.memory_prefix, release = claim_memory_prefix()
        self.folder, self.kind, self.decoder = info.path / split, info.schema.kind, decoder
        self._stored = StoredShards(info, split, remote)
        self._records = RecordReader(info.schema, info.stored_columns)
        super().__init__(str(info.path), split, prefix=self.memory_prefix, release=release, **order)
        self._files = OpenShards()
        self._remembered = VerifiedShards(info, split, [shard.raw_data.basename for shard in self.shards])
        self.verified[:] = self._remembered.known()
        self._decoded: dict[int, Any] = {}  # all samples read so far, if the whole split fits
        self._bytes_left = DECODED_CACHE_BYTES

    def read(self, sample: int) -> Any:
        """Return a decoded sample, which must not be changed.

        Raises:
            DataError: If a shard is missing or damaged, or the record cannot be decoded.
        """
        if sample in self._decoded:
            return self._decoded[sample]
        decoded = self._read(sample)
        if self._bytes_left > 0:
            self._decoded[sample], size = self.decoder.compact(decoded)
            self._bytes_left -= PER_IMAGE_OVERHEAD + size
            if self._bytes_left <= 0:  # a cache of part of a large split would seldom be hit
                self._decoded.clear()
        return decoded

    def _read(self, sample: int) -> Any:
        number, row = self.spanner[sample]
        number = int(number)
        try:
            shard, data = self.shards[number], self._read_record(number, row)
            return self.decoder.decode(self._records.read(data, shard.column_names, shard.column_sizes))
        except (ValueError, IndexError) as error:
            what = self.kind.replace("_", " ")
            raise DataError(
                f"{self.folder.name} sample {sample} (row {row} of {self._file(number)}) is not a readable {what}: "
                f"{error}"
            ) from None
        except OSError as error:
            raise unreadable_error(error, self._file(number), DataError) from None

    def _read_record(self, number: int, row: int) -> bytes:
        try:
            return (self._files.get(number) or self._open(number)).read(row)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            self._files.close(number)  # the open file was replaced on another node of a network file system
            return self._open(number).read(row)

    def _open(self, number: int) -> OpenShard:
        """Open a shard, and verify it if that was not done for the file that is opened."""
        for _ in range(3):
            if not self.verified[number]:
                self.verify_shard(number)
            with suppress(FileNotFoundError):
                shard = OpenShard(str(self._file(number)))
                if shard.stamp == self._remembered.stamp(number):
                    self._files.add(number, shard)
                    return shard
            self.verified[number] = 0  # it was replaced or removed since it was verified
        raise DataError(f"{self._file(number)} changes while it is read; stop what writes it")

    def _file(self, number: int) -> Path:
        return self._stored.file(self.shards[number])

    def verify_shard(self, shard_id: int) -> None:
        """Copy a shard if that is necessary, and check its hash, in one process of the node while the others wait.

        Raises:
            DataError: If the shard cannot be downloaded, unpacked or read, or is damaged.
        """
        file, shard = self._file(shard_id), self.shards[shard_id]
        stripe = zlib.crc32(os.fsencode(file.resolve())) % 16
        with file_lock(runtime_dir() / f"cache-{stripe}.lock"):
            if self.verified[shard_id]:
                return
            copied = self._stored.copy_if_missing(shard)
            try:
                stamp = FileStamp.of(file)
            except OSError as error:
                raise unreadable_error(error, file, DataError, self._stored.hint) from None
            if stamp != self._remembered.stamp(shard_id):
                if not copied:
                    check_hash(file, shard.raw_data.hashes["sha256"], name=str(file), hint=self._stored.hint)
                check_offsets(file, shard.samples)
                self._remembered.record(shard_id, stamp)
            self.verified[shard_id] = 1


def check_offsets(file: Path, samples: int) -> None:
    """Check the record offsets in the header of a shard.

    Raises:
        DataError: If records are outside the file or out of order.
    """
    if not are_offsets(np.fromfile(file, np.uint32, samples + 2)[1:], samples, file.stat().st_size):
        raise DataError(f"{file} is not a shard of {samples} samples; {REPREPARE_HINT}")


def are_offsets(begins: NDArray[np.uint32], samples: int, size: int) -> bool:
    """Return whether these are the offsets of the records of a shard of ``size`` bytes, and the offset of its end."""
    ends = begins.astype(np.int64)
    return len(ends) == samples + 1 and ends[-1] == size and bool((np.diff(ends) >= 0).all())
