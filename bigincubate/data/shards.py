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
import itertools
import mmap
import os
import secrets
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed
from PIL import Image
from streaming import StreamingDataset
from streaming.base import shared
from streaming.base.storage import CloudDownloader
from streaming.base.util import retry
from streaming.base.world import World

from ..errors import EnvironmentFault
from .dataset import AGAIN, DatasetInfo
from .file_locks import locked, runtime_dir
from .images import decode

LOCAL = 3  # streaming's state of a shard that can be read
ROOM = 64 << 20  # bytes of what was decoded that a process may hold; of a split that needs more it holds none
APIECE = 2048  # about what Pillow, torch and Python add to it
DAMAGED = "delete it and prepare or download it again"  # what to do about a damaged shard


class Shards(StreamingDataset):
    """Samples of one split by their index, verified and decoded; iterated, in the order of one rank.

    Position j of an epoch belongs to rank j mod ``world``. Neither the number of nodes nor that of workers matters.
    """

    def __init__(
        self, info: DatasetInfo, split: str, *, remote: str | None = None, rank: int = 0, world: int = 1, **order: Any
    ) -> None:
        """``order`` goes to `StreamingDataset`.

        Raises:
            EnvironmentFault: the folder for locks belongs to somebody else.
        """
        self.claim = claim()
        self.folder, self.classes = info.path / split, len(info.classes)
        self.source = f"{remote}/{split}" if remote else None
        with _alone(self.claim):
            super().__init__(local=str(info.path), split=split, **order)
        self._parallel_rank_world = World(1, world, 1, rank)  # whose samples to iterate over, says streaming
        self._names = [str(self._file(number)) for number in range(self.num_shards)]
        self._held: dict[int, tuple[Image.Image, int]] = {}  # what was decoded, while there is room for it
        self._room = ROOM
        # Which shards have been hashed: memory that forked workers share with each other and with later epochs.
        self._verified = np.frombuffer(mmap.mmap(-1, self.num_shards), np.uint8)
        # Where the next iteration begins, for workers that outlive an epoch: the epoch, and samples done in it.
        self._begin = np.frombuffer(mmap.mmap(-1, 16), np.int64)

    def read(self, sample: int) -> tuple[Image.Image, int]:
        """RGB image, not to be changed, and label.

        Raises:
            EnvironmentFault: a shard that is missing or damaged, an image that cannot be decoded.
        """
        if sample in self._held:
            return self._held[sample]
        image, label = self._read(sample)
        if self._room > 0:
            held, size = pixels_alone(image)
            self._room -= APIECE + size
            self._held[sample] = held, label
            if self._room <= 0:  # not a small split: a part of it would seldom be asked for
                self._held.clear()
        return image, label

    def _read(self, sample: int) -> tuple[Image.Image, int]:
        number, row = self.spanner[sample]
        if not self._verified[number]:
            self._verify(number)
        shard = self.shards[number]
        try:
            item = shard.decode_sample(row_of(self._names[number], row))
            if not 0 <= item["label"] < self.classes:
                raise ValueError(f"label {item['label']} of {self.classes} classes")
            return decode(item["image"]), item["label"]
        except (ValueError, IndexError) as error:
            raise EnvironmentFault(
                f"{self.folder.name} sample {sample} (row {row} of {self._file(number)}) is not a readable image: "
                f"{error}"
            ) from None
        except OSError as error:
            raise EnvironmentFault(f"{self._file(number)}: {error.strerror}") from None

    # ---- what streaming calls

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Begin the next iteration at ``epoch``, after ``sample_in_epoch`` samples (over all ranks).

        streaming's own way leaves two open files an epoch behind.
        """
        self._begin[:] = obj["epoch"], obj["sample_in_epoch"]

    @property
    def epoch(self) -> int:
        """Which epoch is iterated over."""
        return int(self._begin[0])

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        return self.epoch, int(self._begin[1])

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch and verify ahead of the reader, in a thread of streaming's, where an error would be lost."""
        if not self._verified[shard_id]:
            with suppress(Exception):  # the reader meets it again, and raises
                self._verify(shard_id)
        self._shard_states[shard_id] = LOCAL

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        """Where all shards are here and hashed, without streaming's threads, which look ahead at every sample."""
        if not self._verified.all():
            return (yield from super()._each_sample_id(it))
        it.non_blocking_exit()
        yield from map(int, it.sample_ids[it.sample_ids >= 0])

    # ---- shards

    def _file(self, number: int) -> Path:
        return self.folder / self.shards[number].raw_data.basename

    def _verify(self, number: int) -> None:
        """Have a shard here and hashed. One worker does it, the others wait."""
        file, raw = self._file(number), self.shards[number].raw_data
        stripe = zlib.crc32(os.fsencode(file.resolve())) % 16  # a cache belongs to all jobs of this node
        with locked(runtime_dir() / (f"cache-{stripe}.lock" if self.source else f"{self.claim}-{stripe}.lock")):
            if self._verified[number]:
                return
            if self.source and not file.exists():
                with download(f"{self.source}/{raw.basename}", file) as temporary:
                    check_hash(temporary, raw.hashes["sha256"], name=f"{self.source}/{raw.basename}")
            else:
                check_hash(file, raw.hashes["sha256"], name=str(file))
            check_offsets(file, self.shards[number].samples)
            self._verified[number] = 1


def row_of(file: str, row: int) -> bytes:
    """A sample's bytes in a shard, which is opened for it: a process cannot have all shards open."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        ends = os.pread(descriptor, 8, 4 * (1 + row))
        begin, end = int.from_bytes(ends[:4], "little"), int.from_bytes(ends[4:], "little")
        return os.pread(descriptor, end - begin, begin)
    finally:
        os.close(descriptor)


def pixels_alone(image: Image.Image) -> tuple[Image.Image, int]:
    """A copy without what its file holds besides (EXIF, profiles, a decoder), and its bytes."""
    alone = image.copy()
    alone.info.clear()
    return alone, 4 * image.width * image.height


def check_offsets(file: Path, samples: int) -> None:
    """Refuse a shard whose samples would lie outside it, or one in another."""
    begins = np.fromfile(file, np.uint32, samples + 2)[1:].astype(np.int64)
    if len(begins) <= samples or begins[-1] != file.stat().st_size or (np.diff(begins) < 0).any():
        raise EnvironmentFault(f"{file} is no shard of {samples} samples; {AGAIN}")


def check_hash(file: Path, expected: str, *, name: str) -> None:
    """
    Raises:
        EnvironmentFault: it cannot be read, or is not what was written.
    """
    try:
        with file.open("rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
    except OSError as error:
        raise EnvironmentFault(f"{name}: {error.strerror}; {DAMAGED}") from None
    if found != expected:
        raise EnvironmentFault(f"{name} is damaged: SHA-256 {found}, expected {expected}; {DAMAGED}")


# ------------------------------------------------------------------------------------------------ remote


@contextmanager
def download(url: str, file: Path) -> Iterator[Path]:
    """Yields the downloaded file under another name, to look at; then it becomes ``file``."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        try:
            retry(num_attempts=3)(lambda: CloudDownloader.direct_download(url, str(temporary)))()
        except Exception as error:  # whatever the storage library raises
            raise EnvironmentFault(f"cannot download {url}: {error}") from None
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


@contextmanager
def _alone(number: int) -> Iterator[None]:
    """Construct as a world of one process, with shared memory named from ``number`` on."""
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with (
        patch.dict(os.environ, one),
        patch.object(torch.distributed, "is_initialized", lambda: False),
        patch.object(shared.prefix, "_each_prefix_int", lambda: itertools.count(number)),
    ):
        yield


def claim() -> int:
    """A number for shared memory that no other live data set of this user has on this node.

    A file of that name is locked for as long as this process and its workers live. Where the lock is free, its owner
    is dead, and what it left in shared memory is removed; streaming's own clean-up removes that of the living too.
    """
    folder = runtime_dir()
    with locked(folder / "claims"):
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
