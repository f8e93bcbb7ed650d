"""A second task and a second model library, from outside the package: regression on vectors with a residual MLP.

A recipe names them as ``second_task:VectorRegression`` and ``second_task:find_mlp_family``; this folder must then be on
``PYTHONPATH``. Nothing here is an image, a class, or timm's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigincubate.config import ModelConfig
from bigincubate.data.chunks import write_chunk, write_description
from bigincubate.data.dataset import DatasetInfo, RecordSchema
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.models.base import Depths, ModelFamily
from bigincubate.tasks.base import EvalBatches, Task, TrainBatches
from bigincubate.tasks.metric import Metric

FEATURES = 8
SCHEMA = RecordSchema("vector", {"vector": f"ndarray:float32:{FEATURES}", "target": "float32"}, {"features": FEATURES})

# ------------------------------------------------------------------------------------------------ data


def write_vectors(folder: Path, *, train: int = 256, val: int = 64) -> Path:
    """Write made-up vectors and a smooth function of each as a prepared data set."""
    generator = np.random.default_rng(0)
    direction = generator.normal(size=FEATURES)
    for split, count in (("train", train), ("val", val)):
        vectors = generator.normal(size=(count, FEATURES)).astype(np.float32)
        targets = np.tanh(vectors @ direction / 2).astype(np.float32)
        records = ({"vector": vector, "target": target} for vector, target in zip(vectors, targets, strict=True))
        (folder / split).mkdir(parents=True)
        write_chunk(folder / split / "00000", SCHEMA.columns, records)
    chunks = {split: [folder / split / "00000"] for split in ("train", "val")}
    write_description(folder, SCHEMA, chunks, {"kind": "made-up vectors"}, {})
    return folder


class VectorTransform:
    """Vectors as they are, one row per sample."""

    def decode(self, record: dict[str, Any]) -> tuple[np.ndarray, float]:
        """Return the vector and its target."""
        return record["vector"], float(record["target"])

    def compact(self, sample: tuple[np.ndarray, float]) -> tuple[tuple[np.ndarray, float], int]:
        """Return the sample, and its bytes."""
        return sample, sample[0].nbytes

    def view(self, sample: tuple[np.ndarray, float], epoch: int, sample_id: int, repeat: int) -> Any:
        """Return the one view."""
        return sample

    def collate(self, views: Sequence[tuple[np.ndarray, float]]) -> dict[str, Tensor]:
        """Return ``vectors`` [n, features] and ``targets`` [n], float32."""
        vectors, targets = zip(*views, strict=True)
        return {"vectors": torch.from_numpy(np.stack(vectors)), "targets": torch.tensor(targets)}


# ------------------------------------------------------------------------------------------------ task


class VectorRegression(Task):
    """Predict a number from a vector."""

    metrics = (Metric("rmse", "RMSE", higher_is_better=False, format=".4f"), Metric("mae", "MAE", "", False, ".4f"))
    unit = "vectors"
    record_kind = SCHEMA.kind

    def train_stream(self, info: DatasetInfo, *, rank: int, world: int) -> TrainBatches:
        """Return vectors and their targets."""
        from bigincubate.data.streams import TrainStream

        train = self.settings.train
        shape = {"seed": train.seed, "batch_size": train.batch_size, "rank": rank, "world": world}
        return TrainStream(info, self.data, VectorTransform(), **shape)

    def eval_stream(
        self, info: DatasetInfo, split: str, *, rank: int = 0, world: int = 1, batch_size: int | None = None
    ) -> EvalBatches:
        """Return vectors and their targets."""
        from bigincubate.data.streams import EvalStream

        return EvalStream(info, split, VectorTransform(), batch_size=batch_size or 16, rank=rank, world=world)

    def loss(self, model: nn.Module, batch: Any, step: int) -> Tensor:
        """Return the mean squared error."""
        return F.mse_loss(model(batch["vectors"]).squeeze(-1), batch["targets"])

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        batches: EvalBatches,
        dist: DistributedContext,
        *,
        pad_batches_across_ranks: bool = False,
    ) -> dict[str, float]:
        """Return the root of the mean squared error and the mean absolute error."""
        training = model.training
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            error = (model(batch["vectors"]).squeeze(-1) - batch["targets"]).double()
            totals += torch.stack([error.square().sum(), error.abs().sum(), torch.tensor(float(len(error)))])
        if pad_batches_across_ranks:
            for _ in range(max(dist.gather(len(batches))) - len(batches)):
                model(batch["vectors"])
        model.train(training)
        if dist.world > 1:
            torch.distributed.all_reduce(totals, group=dist.control)
        squares, absolutes, count = totals.tolist()
        return {"rmse": (squares / count) ** 0.5, "mae": absolutes / count, "samples": int(count)}


# ------------------------------------------------------------------------------------------------ model


class ResidualBlock(nn.Module):
    """``x + down(gelu(up(norm(x))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, width]`` to the same shape."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ResidualBody(nn.Module):
    """The layers of a `ResidualMlp` before its output layer."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, width)
        self.layers = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)


class ResidualMlp(nn.Module):
    """Blocks under a dotted prefix, so that names are not timm's."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.body = ResidualBody(width, depth)
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, features]`` to ``[n, 1]``."""
        x = self.body.embed(x)
        for layer in self.body.layers:
            x = layer(x)
        return self.out(self.body.norm(x))


@dataclass(frozen=True, kw_only=True)
class MlpFamily(ModelFamily):
    """The residual MLP; ``model.args.width`` is its only argument."""

    def build(self, model: ModelConfig, depths: Depths, *, device: str = "cpu") -> nn.Module:
        """Build a model with fresh weights."""
        with torch.device(device):
            return ResidualMlp(model.args["width"], sum(stages[0] for stages in depths))

    def default_depths(self, model: ModelConfig) -> tuple[int, ...]:
        """Return four blocks."""
        return (4,)

    def example_inputs(self, model: ModelConfig, count: int, device: str) -> Tensor:
        """Return zeros ``[count, features]``."""
        return torch.zeros(count, FEATURES, device=device)

    def residual_outputs(self, block: nn.Module) -> list[nn.Module]:
        """Return the last projection of a block."""
        return [block.get_submodule("down")]


def find_mlp_family(model: ModelConfig) -> ModelFamily:
    """Return the family that ``model.library = "second_task:find_mlp_family"`` stands for."""
    return MlpFamily(
        name="residual MLP",
        library=model.library,
        covers="residual MLPs",
        stages=1,
        block="body.layers.{block}",
        stem=("body.embed",),
        tail=("body.norm", "out"),
    )
