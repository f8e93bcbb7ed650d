"""Find the shards of a split where they are stored, and copy those that cannot be read there.

Prepared shards and uncompressed adopted ones are read where they are. Remote shards are downloaded, and compressed ones
unpacked, to the folder of the split next to the description (with ``data.local_cache``, that folder is on the node's
disk).
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import unreadable_error
from .dataset import DatasetInfo
from .remote import DAMAGED_HINT, check_hash, download, is_url


class StoredShards:
    """Where the shards of a split are.

    Args:
        info: The data set.
        split: The split.
        remote: URL from which missing shards are downloaded.
    """

    def __init__(self, info: DatasetInfo, split: str, remote: str | None = None) -> None:
        self._folder = info.path / split
        self._stored = info.stored_folder(split, remote)
        self._remote = remote is not None or is_url(self._stored)
        self._hint = info.repair_hint if info.adopted else DAMAGED_HINT

    @property
    def hint(self) -> str:
        """Return what to do if a shard is damaged."""
        return self._hint

    def file(self, shard: Any) -> Path:
        """Return the file that a shard is read from, which may have to be made first.

        Args:
            shard: A shard of streaming.
        """
        return (self._folder if self._is_copied(shard) else Path(self._stored)) / shard.raw_data.basename

    def copy_if_missing(self, shard: Any) -> bool:
        """Download or unpack a shard that is not read where it is stored, and check its hashes.

        Returns:
            Whether it was done, so that the file matches its hash.

        Raises:
            DataError: If the stored shard is missing or damaged, or the copy cannot be written.
        """
        file = self.file(shard)
        if not self._is_copied(shard) or file.exists():
            return False
        if shard.zip_data is None:
            url = f"{self._stored}/{shard.raw_data.basename}"
            with download(url, file) as temporary:
                check_hash(temporary, shard.raw_data.hashes["sha256"], name=url, hint=self._hint)
        elif self._remote:
            packed = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.packed")
            url = f"{self._stored}/{shard.zip_data.basename}"
            try:
                with download(url, packed):
                    pass
                self._unpack(shard, packed, url, file)
            finally:
                packed.unlink(missing_ok=True)
        else:
            packed = Path(self._stored) / shard.zip_data.basename
            self._unpack(shard, packed, str(packed), file)
        return True

    def _is_copied(self, shard: Any) -> bool:
        return self._remote or shard.zip_data is not None

    def _unpack(self, shard: Any, packed: Path, name: str, file: Path) -> None:
        try:
            content = packed.read_bytes()
        except OSError as error:
            raise unreadable_error(error, packed, DataError, self._hint) from None
        self._check(content, shard.zip_data.hashes["sha256"], name)
        content = unpack(shard.compression, content, name)
        self._check(content, shard.raw_data.hashes["sha256"], f"{name}, unpacked,")
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(file)
        except OSError as error:
            raise DataError(
                f"cannot unpack {name} to {file}: {error.strerror}; set data.local_cache to a folder that can be"
                " written and has space"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _check(self, content: bytes, expected: str, name: str) -> None:
        if (found := hashlib.sha256(content).hexdigest()) != expected:
            raise DataError(f"{name} is damaged: SHA-256 {found}, expected {expected}; {self._hint}")


def unpack(compression: str, content: bytes, name: str) -> bytes:
    """Return the content of a compressed shard.

    Args:
        compression: Algorithm of streaming, such as ``zstd`` or ``zstd:7``.
        content: The compressed bytes.
        name: Name of the file in the error message.

    Raises:
        DataError: If it cannot be unpacked.
    """
    from ..compat.streaming_package import decompress

    try:
        return decompress(compression, content)
    except Exception as error:  # the type depends on the library
        raise DataError(f"{name} cannot be unpacked ({compression}): {error}") from None
