"""What a task is to the trainer: its metrics, its data, its loss.

A task is chosen by ``task.name`` in the recipe and built once per phase. The trainer, the planner and the reports call
nothing of a task but what is declared here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from ..config import DataConfig, ModelConfig, Settings
from ..errors import ConfigError
from .metric import Metric

if TYPE_CHECKING:
    from ..data.batch import Batch
    from ..data.dataset import DatasetInfo
    from ..distributed.process_group import DistributedContext


class TrainBatches(Protocol):
    """The training batches of one rank, without end."""

    steps_per_epoch: int

    def batches(self, step: int) -> Generator[Batch, None, None]:
        """Yield batches from optimizer step ``step`` on."""


class EvalBatches(Protocol):
    """This rank's share of a split, each sample exactly once."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Task(ABC):
    """One phase of what is learned: data, loss and evaluation.

    Args:
        settings: the phase's settings.
        data: the recipe's data settings.

    Attributes:
        metrics: what :meth:`evaluate` measures; the first is the headline.
        unit: what a sample is called in results and rates, such as ``"images"``.
        record_kind: ``kind`` of the data sets that the task reads.
    """

    metrics: ClassVar[tuple[Metric, ...]]
    unit: ClassVar[str]
    record_kind: ClassVar[str]

    def __init__(self, settings: Settings, data: DataConfig) -> None:
        self.settings, self.data = settings, data

    def check_dataset(self, info: DatasetInfo) -> None:
        """Refuse data that the phase cannot learn from.

        Raises:
            ConfigError: naming the data and the key that differs.
        """
        if info.schema.kind != self.record_kind:
            raise ConfigError(f"{info.path} has records of kind {info.schema.kind}; the task reads {self.record_kind}")

    @abstractmethod
    def train_stream(self, info: DatasetInfo, *, rank: int, world: int) -> TrainBatches:
        """Return the training batches of a rank."""

    @abstractmethod
    def eval_stream(
        self, info: DatasetInfo, split: str, *, rank: int = 0, world: int = 1, batch_size: int | None = None
    ) -> EvalBatches:
        """Return a rank's share of a split.

        Args:
            info: the data.
            split: ``"train"`` or ``"val"``.
            rank: whose share.
            world: number of ranks.
            batch_size: samples of this rank in a batch; None: chosen by the task.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the mean loss of a micro-batch: a scalar on the batch's device.

        Whatever is random here (mixing, masking) is a pure function of the seed and ``step``.
        """

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        batches: EvalBatches,
        env: DistributedContext,
        *,
        pad_batches_across_ranks: bool = False,
    ) -> dict[str, float]:
        """Return the metrics by name, and ``samples``, over every sample of every rank, each counted once.

        Args:
            model: put into evaluation mode meanwhile.
            batches: this rank's share.
            env: the ranks.
            pad_batches_across_ranks: the model's forward is collective, so a rank with fewer batches than the others
                repeats its last one without counting it.
        """

    def make_result(
        self, scores: dict[str, float], *, steps: int = 0, seen: int = 0, flops: int = 0, seconds: float = 0.0
    ) -> dict[str, Any]:
        """Return the result of a phase as it is stored and reported.

        Args:
            scores: what :meth:`evaluate` returned.
            steps: optimizer steps of the phase.
            seen: samples that were trained on, with every view of a sample counted.
            flops: training FLOPs.
            seconds: training time.
        """
        return {
            "metrics": {metric.name: scores[metric.name] for metric in self.metrics},
            "headline": self.metrics[0].name,
            "samples": int(scores["samples"]),
            "unit": self.unit,
            "steps": steps,
            "seen": seen,
            "flops": flops,
            "seconds": seconds,
        }

    def preview(self, batch: Batch) -> Tensor | None:
        """Return images ``[n, 3, H, W]`` in 0 to 1 of a training batch for TensorBoard; None: there are none."""
        return None

    def artifact_metadata(self) -> dict[str, Any]:
        """Return what a user of the finished model needs besides its weights, as plain JSON values."""
        return {}

    @classmethod
    def artifact_settings(cls, model: ModelConfig, metadata: dict[str, Any]) -> Settings:
        """Return settings to evaluate a finished model with, given what :meth:`artifact_metadata` returned."""
        return Settings(model=model)
