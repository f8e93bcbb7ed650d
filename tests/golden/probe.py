"""Read the training stream of a run. The only golden code that uses internals of the package."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def read_stream(run_dir: Path, num_ids: int = 1000, num_images: int = 16) -> dict[str, Any]:
    """Read the stream that pre-training in ``run_dir`` reads, from step 0.

    Returns:
        ``ids``: sample ids in order. ``labels``, ``images``: of the first rows; of an image the SHA-256 of its float32
        bytes, its mean and its standard deviation.
    """
    from bigincubate.config import load_recipe
    from bigincubate.data.dataset import open_dataset
    from bigincubate.tasks.registry import make_task

    recipe = load_recipe(str(run_dir / "recipe.toml"))
    task = make_task(recipe.settings("pretrain"), recipe.data)
    stream = task.train_stream(open_dataset(run_dir / "data"), rank=0, world=1)
    ids: list[int] = []
    first = None
    for batch in stream.batches(0):
        first = first or batch
        ids += batch.sample_ids.tolist()
        if len(ids) >= num_ids:
            break
    assert first is not None
    images = first["images"][:num_images].float().contiguous()
    return {
        "ids": ids[:num_ids],
        "labels": first["labels"][:num_images].tolist(),
        "images": [
            {
                "sha256": hashlib.sha256(image.numpy().tobytes()).hexdigest(),
                "mean": round(image.mean().item(), 6),
                "std": round(image.std().item(), 6),
            }
            for image in images
        ],
    }
