"""Download the files of a data set and check their hashes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DataError
from ..files import hash_file, unreadable_error

DAMAGED_HINT = "delete it and prepare or download it again"


def is_url(place: Path | str) -> bool:
    """Return whether a place is the URL of an object store, not a path."""
    return isinstance(place, str) and "://" in place


def check_hash(file: Path, expected: str, *, name: str, hint: str = DAMAGED_HINT) -> None:
    """Check the SHA-256 of a file.

    Args:
        file: The file.
        expected: Its SHA-256 in hexadecimal.
        name: Name of the file in error messages.
        hint: What to do if it is damaged.

    Raises:
        DataError: If the file is missing or has another hash.
        SystemResourceError: If it cannot be read.
    """
    try:
        found = hash_file(file)
    except OSError as error:
        raise unreadable_error(error, file, DataError, hint) from None
    if found != expected:
        raise DataError(f"{name} is damaged: SHA-256 {found}, expected {expected}; {hint}")


@contextmanager
def download(url: str, file: Path) -> Iterator[Path]:
    """Download to a temporary file, which the block may check, and rename it to ``file`` if the block succeeds.

    Yields:
        The path of the temporary file.

    Raises:
        DataError: If the download fails three times.
    """
    from ..compat.streaming_package import CloudDownloader, retry

    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        try:
            retry(num_attempts=3)(lambda: CloudDownloader.direct_download(url, str(temporary)))()
        except Exception as error:  # the type depends on the storage library
            raise DataError(f"cannot download {url}: {error}") from None
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def fetch(remote: str, path: Path, names: Iterable[str]) -> None:
    """Download the files ``names`` of the prepared data set at URL ``remote`` to the folder ``path``, in order."""
    for name in names:
        with download(f"{remote}/{name}", path / name):
            pass
