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
    merged = {split: _merge_indexes(folder / split, chunks) for split, chunks in splits.items()}
    digest = compute_dataset_digest(schema, merged, more)
    description = {"format": FORMAT, **asdict(schema), "source": source, "splits": merged}
    write_json(folder / DESCRIPTION, {**description, **more, "digest": digest})
    return digest


def _merge_indexes(folder: Path, chunks: Sequence[Path]) -> dict[str, Any]:
    """Write one index of all chunks of a split to ``folder``, which contains the chunks."""
    shards = []
    for chunk in chunks:
        for shard in read_json(chunk / INDEX)["shards"]:
            shard["raw_data"]["basename"] = f"{chunk.name}/{shard['raw_data']['basename']}"
            shards.append(shard)
    samples = sum(shard["samples"] for shard in shards)
    return {"samples": samples, "index": write_json(folder / INDEX, {"version": 2, "shards": shards})}
