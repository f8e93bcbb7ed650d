"""Local cache: shards are copied to a local disk of the node when they are first read, and removed after the last use.

All processes of a user on a node share one copy of a data set. Each process holds a shared lock on a file next to the
copy while it reads, and the last process to finish removes the copy. If all processes were killed, the next process
that uses the copy removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..config import Recipe
from ..errors import ConfigError, DataError, SystemResourceError
from ..files import expand_path
from .dataset import INDEX, SPLITS, DatasetInfo, open_dataset, read_json
from .file_locks import wait_for_lock


@contextmanager
def use_local_cache(recipe: Recipe, info: DatasetInfo) -> Iterator[tuple[Recipe, DatasetInfo]]:
    """Train with a local copy of the data set while the block runs, if the recipe sets ``data.local_cache``.

    Args:
        recipe: The recipe of the run.
        info: The data set to copy.

    Yields:
        The recipe with the path of the copy, and the copy. Without ``data.local_cache``, the arguments.

    Raises:
        SystemResourceError: If an environment variable in ``data.local_cache`` is not set, or the data is larger than
            ``data.local_cache_gib`` or than the free space.
    """
    if recipe.data.local_cache is None:
        yield recipe, info
        return
    try:
        cache_root = expand_path(recipe.data.local_cache)
    except ConfigError as error:
        raise SystemResourceError(f"data.local_cache = {recipe.data.local_cache}: {error}") from None
    cache_root.mkdir(parents=True, exist_ok=True)
    folder = cache_root / f"bigincubate-{os.getuid()}-{info.digest[:16]}"
    source = recipe.data.remote or str(info.path.absolute())
    with _reader_lock(folder):
        _check_size(info, folder, recipe.data.local_cache_gib)
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
        copy = open_dataset(folder, source)
        if copy.digest != info.digest:
            raise DataError(f"{folder} is not a copy of {source}; delete it")
        data = recipe.data.model_copy(update={"path": str(folder), "remote": source})
        yield recipe.model_copy(update={"data": data}), copy


@contextmanager
def _reader_lock(folder: Path) -> Iterator[None]:
    """Hold the readers' shared lock on ``folder``. The last reader removes the folder."""
    file = folder.with_name(f".{folder.name}.lock")
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        wait_for_lock(descriptor, fcntl.LOCK_SH, file)
        yield
    finally:
        with suppress(BlockingIOError):  # there are other readers
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _check_size(info: DatasetInfo, folder: Path, limit_gib: float | None) -> None:
    """Refuse a data set that is larger than the limit or the free space (shards already copied count as free space)."""
    indexes = [read_json(info.path / split / INDEX) for split in SPLITS]
    size = sum(int(shard["raw_data"]["bytes"]) for index in indexes for shard in index["shards"])
    copied = sum(file.stat().st_size for file in folder.rglob("*.mds")) if folder.exists() else 0
    free = shutil.disk_usage(folder.parent).free + copied
    allowed = free if limit_gib is None else min(free, int(limit_gib * 2**30))
    if size > allowed:
        limit = "free on that disk" if allowed == free else "allowed by data.local_cache_gib"
        raise SystemResourceError(
            f"data.local_cache = {folder.parent}: the data set has {size / 2**30:.3g} GiB, but only"
            f" {allowed / 2**30:.3g} GiB are {limit}; train without data.local_cache"
        )
