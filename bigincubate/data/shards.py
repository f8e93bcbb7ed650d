"""One split of a prepared data set as a `StreamingDataset` that trusts nothing and shares nothing.

What `streaming` leaves open on a machine with several jobs, and what is done about it here:

- It numbers its shared memory from zero, without a lock, so that jobs that start together collide, and it finds what
  killed ones left. Here each data set starts at a number of its own, and what the dead left is removed (`claim`).
- It couples all ranks. Here each rank stands alone with its workers: nothing to wait for, nothing to deadlock.
- It reads what is on the disk as it is. Here a shard is hashed once before anything is read from it.
- When a download fails, it hangs or ends the epoch early. Here the reader raises.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import secrets
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from streaming.base.storage import CloudDownloader
from streaming.base.util import retry

from ..compat.streaming import IsolatedStreamingDataset
from ..errors import DataError
from .dataset import REPREPARE_HINT, DatasetInfo
from .file_locks import file_lock, runtime_dir

DECODED_CACHE_BYTES = 64 << 20  # per process; a split that needs more is not kept decoded
PER_IMAGE_OVERHEAD = 2048  # bytes, about what Pillow, torch and Python add to an image
DAMAGED = "delete it and prepare or download it again"  # what to do about a damaged shard


class RecordDecoder(Protocol):
    """How a kind of record becomes a sample in memory."""

    def decode(self, record: dict[str, Any]) -> Any:
        """Return the sample of a record, given the record's columns.

        Raises:
            ValueError: the record cannot be right; the message says why.
        """

    def compact(self, sample: Any) -> tuple[Any, int]:
        """Return a copy of a sample without what its file holds besides, to be kept in memory, and its bytes."""


class Shards(IsolatedStreamingDataset):
    """Samples of one split by their index, verified and decoded; iterated, in the order of one rank.

    Position j of an epoch belongs to rank j mod ``world``. Neither the number of nodes nor that of workers matters.
    """

    def __init__(
        self,
        info: DatasetInfo,
        split: str,
        decoder: RecordDecoder,
        *,
        remote: str | None = None,
        rank: int = 0,
        world: int = 1,
        **order: Any,
    ) -> None:
        """``order`` goes to `StreamingDataset`.

        Raises:
            SystemResourceError: the folder for locks belongs to somebody else.
        """
        self.claim = claim()
        self.folder, self.kind, self.decoder = info.path / split, info.schema.kind, decoder
        self.source = f"{remote}/{split}" if remote else None
        super().__init__(str(info.path), split, prefix=self.claim, rank=rank, world=world, **order)
        self._names = [str(self._file(number)) for number in range(self.num_shards)]
        self._held: dict[int, Any] = {}  # decoded samples, while there is room for all of them
        self._room = DECODED_CACHE_BYTES

    def read(self, sample: int) -> Any:
        """Return a decoded sample, which must not be changed.

        Raises:
            DataError: a shard that is missing or damaged, a record that cannot be decoded.
        """
        if sample in self._held:
            return self._held[sample]
        decoded = self._read(sample)
        if self._room > 0:
            self._held[sample], size = self.decoder.compact(decoded)
            self._room -= PER_IMAGE_OVERHEAD + size
            if self._room <= 0:  # not a small split: a part of it would seldom be asked for
                self._held.clear()
        return decoded

    def _read(self, sample: int) -> Any:
        number, row = self.spanner[sample]
        if not self.verified[number]:
            self.verify_shard(number)
        shard = self.shards[number]
        try:
            return self.decoder.decode(shard.decode_sample(row_of(self._names[number], row)))
        except (ValueError, IndexError) as error:
            what = self.kind.replace("_", " ")
            raise DataError(
                f"{self.folder.name} sample {sample} (row {row} of {self._file(number)}) is not a readable {what}: "
                f"{error}"
            ) from None
        except OSError as error:
            raise DataError(f"{self._file(number)}: {error.strerror}") from None

    # ---- shards

    def _file(self, number: int) -> Path:
        return self.folder / self.shards[number].raw_data.basename

    def verify_shard(self, number: int) -> None:
        """Have a shard here and hashed. One worker does it, the others wait."""
        file, raw = self._file(number), self.shards[number].raw_data
        stripe = zlib.crc32(os.fsencode(file.resolve())) % 16  # a cache belongs to all jobs of this node
        with file_lock(runtime_dir() / (f"cache-{stripe}.lock" if self.source else f"{self.claim}-{stripe}.lock")):
            if self.verified[number]:
                return
            if self.source and not file.exists():
                with download(f"{self.source}/{raw.basename}", file) as temporary:
                    check_hash(temporary, raw.hashes["sha256"], name=f"{self.source}/{raw.basename}")
            else:
                check_hash(file, raw.hashes["sha256"], name=str(file))
            check_offsets(file, self.shards[number].samples)
            self.verified[number] = 1


def row_of(file: str, row: int) -> bytes:
    """A sample's bytes in a shard, which is opened for it: a process cannot have all shards open."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        ends = os.pread(descriptor, 8, 4 * (1 + row))
        begin, end = int.from_bytes(ends[:4], "little"), int.from_bytes(ends[4:], "little")
        return os.pread(descriptor, end - begin, begin)
    finally:
        os.close(descriptor)


def check_offsets(file: Path, samples: int) -> None:
    """Refuse a shard whose samples would lie outside it, or one in another."""
    begins = np.fromfile(file, np.uint32, samples + 2)[1:].astype(np.int64)
    if len(begins) <= samples or begins[-1] != file.stat().st_size or (np.diff(begins) < 0).any():
        raise DataError(f"{file} is no shard of {samples} samples; {REPREPARE_HINT}")


def check_hash(file: Path, expected: str, *, name: str) -> None:
    """
    Raises:
        DataError: it cannot be read, or is not what was written.
    """
    try:
        with file.open("rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}; {DAMAGED}") from None
    if found != expected:
        raise DataError(f"{name} is damaged: SHA-256 {found}, expected {expected}; {DAMAGED}")


# ------------------------------------------------------------------------------------------------ remote


@contextmanager
def download(url: str, file: Path) -> Iterator[Path]:
    """Yields the downloaded file under another name, to look at; then it becomes ``file``."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        try:
            retry(num_attempts=3)(lambda: CloudDownloader.direct_download(url, str(temporary)))()
        except Exception as error:  # whatever the storage library raises
            raise DataError(f"cannot download {url}: {error}") from None
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def fetch(remote: str, path: Path, names: Iterable[str]) -> None:
    """Copy files of a prepared data set, one after another."""
    for name in names:
        with download(f"{remote}/{name}", path / name):
            pass


# ------------------------------------------------------------------------------------------------ shared memory


def claim() -> int:
    """A number for shared memory that no other live data set of this user has on this node.

    A file of that name is locked for as long as this process and its workers live. Where the lock is free, its owner
    is dead, and what it left in shared memory is removed; streaming's own clean-up removes that of the living too.
    """
    folder = runtime_dir()
    with file_lock(folder / "claims"):
        for file in folder.glob("*.claim"):
            # BlockingIOError: its owner lives; FileNotFoundError: it went by itself just now
            with suppress(BlockingIOError, FileNotFoundError), file.open() as other:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(int(file.stem))
        while True:
            number = secrets.randbelow(10**9)
            # a signal in the middle of making it: some systems make the file, and Python's second try finds it there
            with suppress(FileExistsError):
                held = (folder / f"{number}.claim").open("x")  # stays open on purpose: the lock is the claim
                break
        fcntl.flock(held, fcntl.LOCK_EX)
    atexit.register(_release, number, held, os.getpid())  # before streaming registers its own: runs after them
    return number


def _release(number: int, held: IO[str], owner: int) -> None:
    if os.getpid() == owner:
        _remove(number)
        held.close()


def _remove(number: int) -> None:
    """Remove the shared memory, the locks and the claim of a data set."""
    for left in (
        *Path("/dev/shm").glob(f"{number:06}_*"),
        *Path(tempfile.gettempdir()).glob(f"{number:06}_*_filelock"),
        *runtime_dir().glob(f"{number}-*.lock"),
        runtime_dir() / f"{number}.claim",
    ):
        left.unlink(missing_ok=True)
