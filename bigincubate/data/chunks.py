"""Writing folders of MDS shards chunk by chunk; a chunk exists completely or not at all.

So the result does not depend on the number of processes, and an interrupted run resumes at the first missing chunk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .dataset import COLUMNS, DESCRIPTION, FORMAT, INDEX, contents_digest, read_json, sync, write_json


def write_chunk(folder: Path, rows: Iterable[tuple[bytes, int]]) -> None:
    """Write a chunk atomically. If another process has written it in the meantime, that chunk is kept.

    Args:
        folder: The folder of the chunk.
        rows: The bytes and the label of each sample.
    """
    from streaming import MDSWriter

    temporary = folder.parent.parent / f".tmp-{folder.parent.name}-{folder.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    with MDSWriter(columns=COLUMNS, out=str(temporary), hashes=["sha256"]) as writer:
        for data, label in rows:
            writer.write({"image": data, "label": label})
    for file in temporary.iterdir():
        sync(file)
    sync(temporary)
    if folder.exists():
        shutil.rmtree(temporary)
        return
    temporary.rename(folder)
    sync(folder.parent)


def describe(
    folder: Path,
    classes: list[str],
    splits: Mapping[str, Sequence[Path]],
    source: dict[str, Any],
    more: dict[str, Any],
) -> str:
    """Write the indexes and the description of a data set whose chunks are complete.

    Args:
        folder: The folder of the data set.
        classes: Names of the classes.
        splits: The chunks of each split, in order.
        source: Where the data came from; not part of the digest.
        more: Values for the keys in `dataset.MORE`, if any.

    Returns:
        The digest of the data set.
    """
    merged = {split: _merge_indexes(folder / split, chunks) for split, chunks in splits.items()}
    digest = contents_digest(classes, merged, more)
    description = {"format": FORMAT, "source": source, "classes": classes, "splits": merged}
    write_json(folder / DESCRIPTION, {**description, **more, "digest": digest})
    return digest


def _merge_indexes(folder: Path, chunks: Sequence[Path]) -> dict[str, Any]:
    """Write one index over the chunks of a split to ``folder``, which has them under their names."""
    shards = []
    for chunk in chunks:
        for shard in read_json(chunk / INDEX)["shards"]:
            shard["raw_data"]["basename"] = f"{chunk.name}/{shard['raw_data']['basename']}"
            shards.append(shard)
    samples = sum(shard["samples"] for shard in shards)
    return {"samples": samples, "index": write_json(folder / INDEX, {"version": 2, "shards": shards})}
