"""Folders of MDS shards, written a chunk at a time: a chunk is there as a whole or not at all.

So what comes of it does not depend on how many processes write, and who was killed goes on from the finished chunks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .dataset import COLUMNS, DESCRIPTION, FORMAT, INDEX, contents_digest, read_json, sync, write_json


def write_chunk(folder: Path, rows: Iterable[tuple[bytes, int]]) -> None:
    """Write a chunk's rows, bytes and a label each. Where another process was first, its chunk stays."""
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
    """Write the indexes and the description of a folder whose chunks are there. Gives its digest.

    Args:
        splits: the chunks of each, in their order. source: where it came from, which the digest does not cover.
        more: what it has of the keys in `dataset.MORE`.
    """
    merged = {split: _merge(folder / split, chunks) for split, chunks in splits.items()}
    digest = contents_digest(classes, merged, more)
    about = {"format": FORMAT, "source": source, "classes": classes, "splits": merged}
    write_json(folder / DESCRIPTION, {**about, **more, "digest": digest})
    return digest


def _merge(folder: Path, chunks: Sequence[Path]) -> dict[str, Any]:
    """One index over the chunks of a split, for a folder that has them under their names."""
    shards = []
    for chunk in chunks:
        for shard in read_json(chunk / INDEX)["shards"]:
            shard["raw_data"]["basename"] = f"{chunk.name}/{shard['raw_data']['basename']}"
            shards.append(shard)
    samples = sum(shard["samples"] for shard in shards)
    return {"samples": samples, "index": write_json(folder / INDEX, {"version": 2, "shards": shards})}
