"""Local cache: shards are copied to a disk of the node when they are first read, and removed after their last reader.

All processes of a user on a node share one copy of a data set. Each process holds a shared lock on a file of that disk
while it reads, and the last one removes the copy. If all were killed, the next process removes it when it ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..config import Recipe
from ..errors import DataError, SystemResourceError
from .dataset import INDEX, SPLITS, DatasetInfo, open_dataset, read_json


@contextmanager
def use_local_cache(recipe: Recipe, info: DatasetInfo) -> Iterator[tuple[Recipe, DatasetInfo]]:
    """Provide the recipe and the data set to train with: a local copy if the recipe sets ``data.local_cache``.

    Args:
        recipe: The recipe of the run.
        info: The data set to copy.

    Yields:
        The recipe with the path of the copy, and the copy; or the arguments without ``data.local_cache``.

    Raises:
        SystemResourceError: If an environment variable in ``data.local_cache`` is not set, or the data is larger than
            ``data.local_cache_gib`` or than the free space.
    """
    if recipe.data.local_cache is None:
        yield recipe, info
        return
    place = Path(os.path.expandvars(recipe.data.local_cache))
    if "$" in str(place):
        raise SystemResourceError(
            f"data.local_cache = {recipe.data.local_cache}: the environment has no such variable here; set it"
        )
    place.mkdir(parents=True, exist_ok=True)
    folder = place / f"bigincubate-{os.getuid()}-{info.digest[:16]}"
    source = recipe.data.remote or str(info.path.absolute())
    with _reader_lock(folder):
        _check_size(info, folder, recipe.data.local_cache_gib)
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
        here = open_dataset(folder, source)
        if here.digest != info.digest:
            raise DataError(f"{folder} is not a copy of {source}; delete it")
        data = recipe.data.model_copy(update={"path": str(folder), "remote": source})
        yield recipe.model_copy(update={"data": data}), here


@contextmanager
def _reader_lock(folder: Path) -> Iterator[None]:
    """Hold the shared lock of the readers of ``folder``. The last reader removes the folder."""
    descriptor = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        with suppress(BlockingIOError):  # there are other readers
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _check_size(info: DatasetInfo, folder: Path, limit_gib: float | None) -> None:
    """Refuse a data set that is larger than the limit or the free space, counting what has been copied already."""
    indexes = [read_json(info.path / split / INDEX) for split in SPLITS]
    size = sum(int(shard["raw_data"]["bytes"]) for index in indexes for shard in index["shards"])
    here = sum(file.stat().st_size for file in folder.rglob("*.mds")) if folder.exists() else 0
    free = shutil.disk_usage(folder.parent).free + here
    allowed = free if limit_gib is None else min(free, int(limit_gib * 2**30))
    if size > allowed:
        limit = "free on that disk" if allowed == free else "allowed by data.local_cache_gib"
        raise SystemResourceError(
            f"the data has {size / 2**30:.3g} GiB, {allowed / 2**30:.3g} GiB are {limit} ({folder.parent}); train"
            " without data.local_cache"
        )
