"""Write the descriptions of prepared data: of the whole data set and of its partitions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..files import fsync_path, link_or_copy
from .chunks import write_description
from .dataset import RecordSchema
from .partitions import partition_path

logger = logging.getLogger(__name__)


class WrittenChunk(Protocol):
    """A chunk that is complete."""

    @property
    def folder(self) -> Path:
        """The folder of the shards."""

    @property
    def part(self) -> int:
        """The partition that the samples belong to."""


def write_descriptions(
    out: Path,
    schema: RecordSchema,
    chunks: Mapping[str, Sequence[WrittenChunk]],
    origin: dict[str, Any],
    parts: int,
    size: int,
) -> None:
    """Write the descriptions of the partitions and of the whole data set.

    Args:
        out: The folder of the data set.
        schema: Schema of the records.
        chunks: The chunks of each split, which are complete.
        origin: Where the data came from.
        parts: Number of partitions.
        size: Number of training samples.
    """
    digests, linked = [], True
    for number in range(parts):
        folder = Path(partition_path(out, number))
        own = {"train": [chunk for chunk in chunks["train"] if chunk.part == number], "val": chunks["val"]}
        for split, split_chunks in own.items():
            for chunk in split_chunks:
                linked &= _link_folder(chunk.folder, folder / split / chunk.folder.name)
        folders = {split: [chunk.folder for chunk in split_chunks] for split, split_chunks in own.items()}
        digests.append(write_description(folder, schema, folders, origin, {"part": number, "of": size}))
    if parts:
        fsync_path(out / "parts")
    if not linked:
        logger.warning(
            "%s: the file system has no hard links; the partitions are copies and take as much space again", out
        )
    folders = {split: [chunk.folder for chunk in split_chunks] for split, split_chunks in chunks.items()}
    write_description(out, schema, folders, origin, {"parts": digests} if parts else {})


def _link_folder(folder: Path, other: Path) -> bool:
    """Hard-link the files of a folder into another one, or copy them if the file system has no hard links.

    Returns:
        Whether all files are links.
    """
    other.mkdir(parents=True)
    linked = [link_or_copy(file, other / file.name) for file in folder.iterdir()]
    fsync_path(other)
    return all(linked)
