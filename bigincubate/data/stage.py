"""A data set on a disk of the node: shards are copied as they are first read, and gone when their last reader is.

All processes of a user on a node share one copy of a data set. Each holds a shared lock, in a file of that disk, for as
long as it reads; who leaves as the last one removes the copy. Where all were killed, the next that comes and goes does.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..config import Recipe
from ..errors import EnvironmentFault
from .dataset import INDEX, SPLITS, DatasetInfo, open_dataset, read_json


@contextmanager
def staged(recipe: Recipe, info: DatasetInfo) -> Iterator[tuple[Recipe, DatasetInfo]]:
    """The recipe and the data to train with: under ``data.stage``, where the recipe has it.

    Raises:
        EnvironmentFault: an environment variable in ``data.stage`` is not set, the data is larger than
            ``data.stage_gib``, or does not fit on the disk.
    """
    if recipe.data.stage is None:
        yield recipe, info
        return
    place = Path(os.path.expandvars(recipe.data.stage))
    if "$" in str(place):
        raise EnvironmentFault(f"data.stage = {recipe.data.stage}: the environment has no such variable here")
    place.mkdir(parents=True, exist_ok=True)
    folder = place / f"bigincubate-{os.getuid()}-{info.digest[:16]}"
    source = recipe.data.remote or str(info.path.absolute())
    with _reader(folder):
        _check_room(info, folder, recipe.data.stage_gib)
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
        here = open_dataset(folder, source)
        if here.digest != info.digest:
            raise EnvironmentFault(f"{folder} is not a copy of {source}; delete it")
        data = recipe.data.model_copy(update={"path": str(folder), "remote": source})
        yield recipe.model_copy(update={"data": data}), here


@contextmanager
def _reader(folder: Path) -> Iterator[None]:
    """Be one of those that read from ``folder``; the last one removes it."""
    descriptor = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        with suppress(BlockingIOError):  # somebody still reads
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _check_room(info: DatasetInfo, folder: Path, most: float | None) -> None:
    indexes = [read_json(info.path / split / INDEX) for split in SPLITS]
    size = sum(int(shard["raw_data"]["bytes"]) for index in indexes for shard in index["shards"])
    here = sum(file.stat().st_size for file in folder.rglob("*.mds")) if folder.exists() else 0
    free = shutil.disk_usage(folder.parent).free + here
    allowed = free if most is None else min(free, int(most * 2**30))
    if size > allowed:
        limit = "free on that disk" if allowed == free else "allowed by data.stage_gib"
        raise EnvironmentFault(
            f"the data has {size / 2**30:.3g} GiB, {allowed / 2**30:.3g} GiB are {limit} ({folder.parent}); train"
            " without data.stage"
        )
