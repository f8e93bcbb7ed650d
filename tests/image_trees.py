"""Folders of small images, and what was prepared from them."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bigincubate.data.prepare import prepare_dataset
from bigincubate.errors import BigincubateError, DataError


def write_tree(root: Path, per_class: int, classes: str = "abc") -> Path:
    """SOURCE/<class>/*.png: 8x8 images, no two the same."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(classes), per_class, 8, 8, 3), dtype=np.uint8)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for row in range(per_class):
            Image.fromarray(pixels[label, row]).save(root / name / f"{row:04}.png")
    return root


def read_contents(folder: Path) -> dict[str, bytes]:
    """Files with their bytes, folders with none."""
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else b"" for f in folder.rglob("*")}


def read_samples(folder: Path, split: str) -> list[tuple[bytes, int]]:
    from streaming.base.format import reader_from_json

    index = json.loads((folder / split / "index.json").read_text())
    readers = [reader_from_json(str(folder), split, shard) for shard in index["shards"]]
    return [(item["image"], item["label"]) for reader in readers for item in reader]


def read_pixels(folder: Path) -> Counter[tuple[str, bytes, int]]:
    """Return how often each image occurs in prepared data: its split, pixels and label."""
    return Counter(
        (split, Image.open(io.BytesIO(image)).convert("RGB").tobytes(), label)
        for split in ("train", "val")
        for image, label in read_samples(folder, split)
    )


def fault_of(source: Path, kind: type[BigincubateError] = DataError, **options: Any) -> str:
    """Prepare a source that is refused, and return the line of the error. No data that looks complete may remain."""
    out = source.parent / "fault"
    with pytest.raises(kind) as fault:
        prepare_dataset(str(source), out, **options)
    assert "\n" not in str(fault.value)
    assert not (out / "dataset.json").exists()
    return str(fault.value)
