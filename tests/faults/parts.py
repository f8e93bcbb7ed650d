"""Small checkpoints and artifacts, as large as the faults need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigincubate.config import ModelConfig, TaskConfig
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.storage.artifacts import ArtifactManifest, ModelSpec
from bigincubate.storage.checkpoint_manager import Checkpoint, CheckpointManager

SPEC = ModelSpec(
    task=TaskConfig(),
    model=ModelConfig(
        name="vit_tiny_patch16_224",
        args={"patch_size": 2, "embed_dim": 24, "num_heads": 3},
        num_classes=10,
        img_size=8,
    ),
    depths=[[1], [1]],
    metadata={"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "eval_crop": 1.0},
)
MANIFEST = ArtifactManifest(
    kind="model", phase="finetune", model=SPEC, weights="raw", identity={"steps": 1}, data="d" * 64
)


def manager(folder: Path, **options: Any) -> CheckpointManager:
    return CheckpointManager.open(folder / "checkpoints", DistributedContext(), digest="d" * 64, **options)


def tensors(step: int, size: int = 6) -> dict[str, Tensor]:
    return {"model/w": torch.full((size,), float(step)), "optim/step/w": torch.tensor(step)}


def save(checkpoints: CheckpointManager, step: int, size: int = 6) -> None:
    checkpoints.save(step, tensors(step, size), {"step": step})


def check_whole(checkpoint: Checkpoint | None) -> int | None:
    """The step of a checkpoint, whose tensors must be those of that step."""
    if checkpoint is None:
        return None
    assert checkpoint.state == {"step": checkpoint.step}
    assert checkpoint.tensors.keys() == tensors(0).keys()
    assert (checkpoint.tensors["model/w"] == checkpoint.step).all()
    assert checkpoint.tensors["optim/step/w"] == checkpoint.step
    return checkpoint.step
