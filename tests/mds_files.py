"""Write data sets for tests with mosaicml-streaming's own writer."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from streaming import MDSWriter

Samples = list[tuple[bytes, int]]  # image files with their labels
COLUMNS = {"id": "str", "photo": "bytes", "weight": "float32", "y": "uint16"}
SHARD_BYTES = 6000


def make_samples(count: int, classes: int = 3, seed: int = 0) -> Samples:
    """Return image files (PNG) of 8 x 8 pixels, all different, with labels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    samples = []
    for row, image in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        samples.append((file.getvalue(), row % classes))
    return samples


def describe_sample(number: int, image: bytes, label: int) -> dict[str, Any]:
    """Return a sample with the columns `COLUMNS`."""
    return {"id": f"photo {number}", "photo": image, "weight": np.float32(0.5), "y": np.uint16(label)}


def write_mds(
    folder: Path,
    samples: Iterable[tuple[bytes, int]],
    *,
    columns: Mapping[str, str] = COLUMNS,
    describe: Callable[[int, bytes, int], dict[str, Any]] = describe_sample,
    compression: str | None = "zstd",
    hashes: list[str] | None = None,
    size_limit: int = SHARD_BYTES,
) -> Path:
    """Write one split with `MDSWriter`."""
    with MDSWriter(
        out=str(folder), columns=dict(columns), compression=compression, hashes=hashes, size_limit=size_limit
    ) as writer:
        for number, (image, label) in enumerate(samples):
            writer.write(describe(number, image, label))
    return folder


def shard_sizes(folder: Path) -> list[int]:
    """Return the number of samples of each shard."""
    return [shard["samples"] for shard in json.loads((folder / "index.json").read_text())["shards"]]
