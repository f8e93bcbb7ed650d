"""Write a data set as chunks, each a folder of MDS shards that is written atomically.

Therefore the result does not depend on the number of processes, and an interrupted run writes only the missing chunks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import fsync_path
from .dataset import DESCRIPTION, FORMAT, INDEX, RecordSchema, compute_dataset_digest, read_json, write_json


def write_chunk(folder: Path, columns: dict[str, str], records: Iterable[dict[str, Any]]) -> None:
    """Write a chunk atomically. A chunk that another process has written in the meantime is kept.

    Args:
        folder: The folder of the chunk.
        columns: MDS encoding of each column.
        records: A value for each column.
    """
    from ..compat.streaming_package import MDSWriter

    temporary = folder.parent.parent / f".tmp-{folder.parent.name}-{folder.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    with MDSWriter(columns=columns, out=str(temporary), hashes=["sha256"]) as writer:
        for record in records:
            writer.write(record)
    for file in temporary.iterdir():
        fsync_path(file)
    fsync_path(temporary)
    if folder.exists():
        shutil.rmtree(temporary)
        return
    temporary.rename(folder)
    fsync_path(folder.parent)


def write_description(
    folder: Path,
    schema: RecordSchema,
    splits: Mapping[str, Sequence[Path]],
    source: dict[str, Any],
    more: dict[str, Any],
) -> str:
    """Write the indexes and the description (``dataset.json``) of a data set whose chunks are complete.

    Args:
        folder: The folder of the data set.
        schema: Schema of the records.
        splits: The chunks of each split, in order.
        source: Where the data came from; not part of the digest.
        more: Values of the keys in `dataset.OPTIONAL_KEYS`, if any.

    Returns:
        The digest of the data set.
    """
    return describe_shards(
        folder, schema, {split: _list_shards(chunks) for split, chunks in splits.items()}, source, more
    )


def describe_shards(
    folder: Path,
    schema: RecordSchema,
    shards: Mapping[str, Sequence[dict[str, Any]]],
    source: dict[str, Any],
    more: dict[str, Any],
    folders: dict[str, str] | None = None,
) -> str:
    """Write the indexes and the description of a data set, given the entry of each shard in the index.

    Args:
        folder: The folder of the data set.
        schema: Schema of the records.
        shards: The entries of each split, in order.
        source: Where the data came from; not part of the digest.
        more: Values of the keys in `dataset.OPTIONAL_KEYS`, if any.
        folders: For an adopted data set, the folder of the shards of each split; not part of the digest.

    Returns:
        The digest of the data set.
    """
    splits = {}
    for split, entries in shards.items():
        index = write_json(folder / split / INDEX, {"version": 2, "shards": entries})
        splits[split] = {"samples": sum(shard["samples"] for shard in entries), "index": index}
    digest = compute_dataset_digest(schema, splits, more)
    description = {"format": FORMAT, **asdict(schema), "source": source, "splits": splits, **more}
    if folders is not None:
        description["folders"] = folders
    write_json(folder / DESCRIPTION, {**description, "digest": digest})
    return digest


def _list_shards(chunks: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the entries of the shards of all chunks, for the index of the folder that contains the chunks."""
    shards = []
    for chunk in chunks:
        for shard in read_json(chunk / INDEX)["shards"]:
            shard["raw_data"]["basename"] = f"{chunk.name}/{shard['raw_data']['basename']}"
            shards.append(shard)
    return shards
