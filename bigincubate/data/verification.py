"""Which shards match their hashes: each is hashed once per node, and remembered in ``verified.json`` next to the data.

    {"digest": "…", "train": {"00000/shard.00000.mds": [<size>, <modification time in ns>, <inode>], …}, "val": {…}}

A shard with the same size, modification time and inode is not hashed again. Damage that changes none of them is found
by `bigincubate verify` and ``--verify-data``, which hash every shard. Each node updates the file every two seconds
while it hashes shards, and after the last shard of a split. A folder that cannot be written has no such file, so every
job hashes its shards once per node.

While processes of a node read a split, they share a table of its stamps, a file in the user's folder for locks.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..files import MISSING_OR_WRONG_TYPE, hash_file, read_small_file, unreadable_error, write_text
from .dataset import DESCRIPTION, INDEX, INVALID_JSON_ERRORS, SPLITS, DatasetInfo, describe_dataset, read_json
from .file_locks import file_lock, runtime_dir
from .open_shards import FileStamp
from .partitions import partition_path
from .remote import DAMAGED_HINT, is_url

VERIFIED = "verified.json"
SAVE_SECONDS = 2.0  # seconds between two updates of the file by one node while shards are being hashed
HASH_THREADS = 8

logger = logging.getLogger(__name__)


class VerifiedShards:
    """The stamps of the verified shards of one split, shared by all processes of this user on this node.

    Args:
        info: The data set.
        split: The split.
        names: The paths of the shards, relative to the folder of the split.
    """

    def __init__(self, info: DatasetInfo, split: str, names: Sequence[str]) -> None:
        self._file, self._digest, self._split, self._names = info.path / VERIFIED, info.digest, split, names
        self._forgotten: set[str] = set()
        place = hashlib.sha256(f"{info.path.resolve()} {info.digest} {split}".encode()).hexdigest()[:24]
        table = _attach_node_table(f"verified-{place}", len(names) + 1)
        self._stamps, self._saved_at = table[:-1], table[-1, :1]  # the time of the last update by this node, in ns
        if not self.known().all():
            remembered = read_verified(self._file, self._digest)[split]
            for number in np.flatnonzero(~self.known()):
                if (stamp := remembered.get(names[number])) is not None:
                    self._stamps[number] = stamp

    def known(self) -> NDArray[np.bool_]:
        """Return which shards were verified, [shards]. A shard may have been replaced since then."""
        return self._stamps.any(axis=1)

    def stamp(self, number: int) -> FileStamp:
        """Return the stamp that a shard had when it was verified; zeros if it was not."""
        return FileStamp(*self._stamps[number].tolist())

    def record(self, number: int, stamp: FileStamp) -> None:
        """Remember that a shard with this stamp matches its hash. The file is updated only now and then."""
        self._stamps[number] = stamp
        self._forgotten.discard(self._names[number])
        if self.known().all() or time.monotonic_ns() - self._saved_at[0] > SAVE_SECONDS * 1e9:
            self.save()

    def forget(self, number: int) -> None:
        """Forget a shard, because it is damaged."""
        self._stamps[number] = 0
        self._forgotten.add(self._names[number])

    def save(self) -> None:
        """Add what is new to the file. Does nothing if the folder of the data cannot be written."""
        self._saved_at[0] = time.monotonic_ns()
        remembered = read_verified(self._file, self._digest)
        rows = zip(self._names, self._stamps.tolist(), strict=True)
        own = remembered[self._split] | {name: stamp for name, stamp in rows if any(stamp)}
        own = {name: stamp for name, stamp in own.items() if name not in self._forgotten}
        if own != remembered[self._split]:
            with suppress(OSError):
                text = json.dumps({"digest": self._digest, **remembered, self._split: own}, separators=(",", ":"))
                write_text(self._file, text + "\n")


def read_verified(file: Path, digest: str) -> dict[str, dict[str, list[int]]]:
    """Return the stamps of verified shards by split and name.

    Args:
        file: The file, which may be missing. A damaged file is ignored with a warning.
        digest: Digest of the data set. A file of other data, which was in this folder before, is ignored.
    """
    nothing: dict[str, dict[str, list[int]]] = {split: {} for split in SPLITS}
    try:
        value = json.loads(read_small_file(file))
        if value["digest"] != digest:
            return nothing
        return {split: {name: _checked_stamp(stamp) for name, stamp in value[split].items()} for split in SPLITS}
    except FileNotFoundError:
        return nothing
    except (OSError, *INVALID_JSON_ERRORS):
        logger.warning("%s is damaged and ignored: the shards are hashed again", file)
        return nothing


def _checked_stamp(value: Any) -> list[int]:
    """Return a stamp as it was read from JSON.

    Raises:
        ValueError: It is not three integers of 64 bits.
    """
    if isinstance(value, list) and len(value) == 3 and all(type(n) is int and abs(n) < 2**63 for n in value):
        return value
    raise ValueError(f"{value!r} is not a stamp")


def find_damaged_shards(info: DatasetInfo) -> Iterator[tuple[Path, str]]:
    """Hash every shard, and yield each damaged one with the reason. Missing shards are skipped.

    This includes the partitions that are present, and compressed shards as stored and as unpacked; a hard link is
    hashed only once. Of what is stored at a URL, only the copies are hashed. Shards that match their hashes are
    remembered as verified, and damaged ones no longer are.
    """
    hashes: dict[FileStamp, str] = {}
    yield from _find_damaged(info, hashes)
    for number in range(len(info.parts)):
        path = Path(partition_path(info.path, number))
        if (path / DESCRIPTION).exists():
            try:
                yield from _find_damaged(describe_dataset(path), hashes)
            except DataError as error:
                yield path, str(error)


def _find_damaged(info: DatasetInfo, hashes: dict[FileStamp, str]) -> Iterator[tuple[Path, str]]:
    for split in SPLITS:
        entries = read_json(info.path / split / INDEX)["shards"]
        shards = [entry["raw_data"] for entry in entries]
        verified = VerifiedShards(info, split, [raw["basename"] for raw in shards])
        place, copies = info.stored_folder(split), info.path / split
        stored = copies if is_url(place) else Path(place)
        files = [_readable_file(copies, stored, entry) for entry in entries]
        with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashing releases the interpreter lock
            found = pool.map(lambda file, raw: _compare_hash(file, raw["hashes"]["sha256"], hashes), files, shards)
            for number, (stamp, problem) in enumerate(found):
                if problem is not None:
                    verified.forget(number)
                    yield files[number], problem
                elif stamp is not None:
                    verified.record(number, stamp)
            packed = [entry["zip_data"] for entry in entries if entry["zip_data"] and not is_url(place)]
            files = [stored / file["basename"] for file in packed]
            found = pool.map(
                lambda file, packed: _compare_hash(file, packed["hashes"]["sha256"], hashes), files, packed
            )
            for file, (_, problem) in zip(files, found, strict=True):
                if problem is not None:
                    yield file, problem
        verified.save()


def _readable_file(folder: Path, stored: Path, entry: dict[str, Any]) -> Path:
    """Return the file that a shard is read from: where it is stored, or its copy.

    Args:
        folder: The folder of copies.
        stored: The folder of the shards as stored.
        entry: The entry of the shard in the index.
    """
    name = entry["raw_data"]["basename"]
    copied = entry["zip_data"] or (folder / name).exists()
    return (folder if copied else stored) / name


def hash_all_shards(info: DatasetInfo) -> None:
    """Hash every shard of a data set that is present.

    Raises:
        DataError: Shards are damaged; the message names the first.
    """
    if damaged := list(find_damaged_shards(info)):
        file, problem = damaged[0]
        others = f" ({len(damaged) - 1} more are damaged)" if len(damaged) > 1 else ""
        raise DataError(f"{file} is damaged: {problem}{others}; {DAMAGED_HINT}")


def _compare_hash(file: Path, expected: str, hashes: dict[FileStamp, str]) -> tuple[FileStamp | None, str | None]:
    """Return the stamp of a shard, or None if it is missing, and what is wrong with it, or None.

    Args:
        file: The shard.
        expected: Its SHA-256.
        hashes: Those of files that were hashed already; this one is added.

    Raises:
        SystemResourceError: The shard cannot be read.
    """
    try:
        stamp = FileStamp.of(file)
        found = hashes[stamp] if stamp in hashes else hashes.setdefault(stamp, hash_file(file))
    except FileNotFoundError:
        return None, None
    except OSError as error:
        if error.errno not in MISSING_OR_WRONG_TYPE:
            raise unreadable_error(error, file, DataError) from None
        return None, str(error.strerror)
    return stamp, None if found == expected else f"SHA-256 {found[:12]}…, expected {expected[:12]}…"


# ------------------------------------------------------------------------------------------------ the table of a node


def _attach_node_table(name: str, rows: int) -> NDArray[np.int64]:
    """Return the table ``[rows, 3]`` that the processes of this user on this node share under this name.

    The first process finds zeros. Each process holds a shared lock on the file for as long as it uses the table. A
    table that no process uses is removed, so that it remembers nothing that ``verified.json`` does not.
    """
    folder, size = runtime_dir(), 3 * 8 * rows
    with file_lock(folder / "verified.lock"):
        for file in folder.glob("verified-*"):
            _remove_unused(file)
        try:
            descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                os.posix_fallocate(descriptor, 0, size)
                memory = mmap.mmap(descriptor, size)  # keeps a copy of the descriptor, and with it the lock
            finally:
                os.close(descriptor)
        except OSError:  # a full disk: this process and its workers share a table of their own
            memory = mmap.mmap(-1, size)
    return np.frombuffer(memory, np.int64, 3 * rows).reshape(rows, 3)


def _remove_unused(file: Path) -> None:
    with suppress(OSError):  # BlockingIOError: a process uses it
        descriptor = os.open(file, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
        finally:
            os.close(descriptor)
