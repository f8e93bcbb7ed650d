"""The interface of tasks: metrics, data and loss.

The recipe chooses a task by ``task.name``; it is built once per phase. Trainer, planner and reports use only this
interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from ..config import DataConfig, ModelConfig, Settings
from ..errors import ConfigError
from .evaluation import Evaluation, EvaluationRequest, Evaluator
from .metric import Metric

if TYPE_CHECKING:
    from pathlib import Path

    from ..data.batch import Batch
    from ..data.dataset import DatasetInfo
    from ..data.partitions import PartitionFunction
    from ..distributed.process_group import DistributedContext


class TrainBatches(Protocol):
    """An infinite stream of the training batches of one rank."""

    steps_per_epoch: int

    def batches(self, step: int) -> Generator[Batch, None, None]:
        """Yield batches, starting with that of optimizer step ``step``."""


class EvalBatches(Protocol):
    """This rank's part of a split. Over all ranks, each sample appears exactly once."""

    def __len__(self) -> int:
        """Return the number of batches."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""


class _JoinedBatches:
    """Batches of several splits, one split after another."""

    def __init__(self, splits: Sequence[EvalBatches]) -> None:
        self._splits = splits

    def __len__(self) -> int:
        return sum(map(len, self._splits))

    def __iter__(self) -> Iterator[Batch]:
        return chain.from_iterable(self._splits)


class Task(ABC):
    """Data, loss and evaluation of one phase.

    Args:
        settings: The phase's settings.
        data: The recipe's data settings.

    Attributes:
        metrics: The metrics that :meth:`evaluate` returns; the first is the headline.
        unit: Name of what results and rates count, such as ``"images"`` or ``"tokens"``; see :meth:`sample_units`.
        record_kind: The ``kind`` of data sets that the task can read.
        unused_keys: Keys and tables of a recipe that the task does not read.
        foreign_libraries: Values of ``model.library`` whose models the task cannot train.
        hub_name: The task's name on a model hub (``pipeline_tag``), such as ``"image-classification"``; None if it has
            none.

    Raises:
        ConfigError: A recipe sets an unused key, or has a model of a foreign library.
    """

    metrics: ClassVar[tuple[Metric, ...]]
    unit: ClassVar[str]
    record_kind: ClassVar[str]
    unused_keys: ClassVar[tuple[str, ...]] = ()
    foreign_libraries: ClassVar[tuple[str, ...]] = ()
    hub_name: ClassVar[str | None] = None

    def __init__(self, settings: Settings, data: DataConfig) -> None:
        self.settings, self.data = settings, data
        name, library = settings.task.name, settings.model.library
        if library in self.foreign_libraries:
            raise ConfigError(
                f'the task {name} cannot train models of model.library = "{library}"; set task.name or model.library'
            )
        given, default = _flatten(settings.model_dump()), _flatten(Settings().model_dump())
        for key in given:
            if key.startswith(tuple(f"{unused}." for unused in self.unused_keys)) and given[key] != default[key]:
                raise ConfigError(f"{key.rstrip('.')} = {given[key]!r} is not used by the task {name}; remove it")

    def check_dataset(self, info: DatasetInfo) -> None:
        """Check that the phase can use a data set.

        Raises:
            ConfigError: The data does not fit; the message names the data and the key that differs.
        """
        if info.schema.kind != self.record_kind:
            raise ConfigError(f"{info.path} has records of kind {info.schema.kind}; the task reads {self.record_kind}")

    def keeps_head(self, records: Mapping[str, Any], info: DatasetInfo) -> bool:
        """Return whether the outputs of a finished model mean for a data set what they mean for its own data.

        If they do not, fine-tuning the model starts with a new head. Called only if the head has the right shape.

        Args:
            records: Properties of the records that the model was trained on, as far as they are known.
            info: The data set.

        Raises:
            ConfigError: The model cannot be fine-tuned on the data.
        """
        return True

    @classmethod
    def sample_units(cls, settings: Settings) -> int:
        """Return the number of units in a sample, such as the tokens of a window."""
        return 1

    @classmethod
    def describe_model(cls, model: ModelConfig) -> str | None:
        """Return what a model reads and puts out, in one or two sentences for people who use it; None by default."""
        return None

    @classmethod
    def approximate_flops(cls, parameters: int, units: int) -> int | None:
        """Return a usual estimate of the training FLOPs for comparison with those counted; None if there is none.

        Args:
            parameters: Number of parameters of the model.
            units: Number of units trained on.
        """
        return None

    def prepare_data(self, source: str, out: Path, divide: PartitionFunction | None) -> None:
        """Prepare built-in data.

        Args:
            source: ``data.source``.
            out: The folder to write.
            divide: Divides the training samples into partitions; None without partitions.

        Raises:
            ConfigError: The task has no built-in data of this name.
        """
        raise ConfigError(f"data.source = {source!r} is not data of task.name = {self.settings.task.name!r}")

    @classmethod
    def smoke_data(cls) -> tuple[str, int]:
        """Return the ``data.source`` of a smoke test, and the number of samples in its training split."""
        return "made-up", 256

    @abstractmethod
    def train_stream(self, info: DatasetInfo, *, rank: int, world: int) -> TrainBatches:
        """Return the training batches of a rank."""

    @abstractmethod
    def eval_stream(
        self, info: DatasetInfo, split: str, *, rank: int = 0, world: int = 1, batch_size: int | None = None
    ) -> EvalBatches:
        """Return a rank's part of a split.

        Args:
            info: The data set.
            split: ``"train"`` or ``"val"``.
            rank: The rank.
            world: Number of ranks.
            batch_size: Batch size of this rank; None for the task's default.
        """

    def prepare_batch(self, batch: Batch, env: DistributedContext) -> Batch:
        """Return a training batch with what :meth:`loss` needs to know of the whole global batch.

        Called once per step on every rank, before the batch is divided into micro-batches; may communicate.
        """
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the mean loss of a micro-batch: a scalar on the batch's device.

        Random draws (mixing, masking) are a pure function of the seed and ``step``.
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
        """Return the metrics by name over the samples of all ranks, and ``samples``, their number.

        Args:
            model: The model; it is in evaluation mode during this call.
            batches: This rank's part of the split.
            env: The process group.
            pad_batches_across_ranks: Whether a rank with fewer batches than others repeats its last batch, without
                counting it. Needed if the forward pass of the model is collective.
        """

    def evaluator(self, request: EvaluationRequest) -> Evaluator:
        """Check a request to evaluate a finished model, and return a function that does it in this process.

        Raises:
            ConfigError: The data does not fit the model, or the task cannot do what is asked for.
        """
        name, info = self.settings.task.name, request.info
        if request.probe:
            raise ConfigError(f"probe = {request.probe!r}: the task {name} has no features to classify; leave it out")
        if request.classes:
            raise ConfigError(f"--classes {request.classes}: the task {name} has no classes to match; leave it out")
        if request.per_class:
            raise ConfigError(f"--per-class: the task {name} has no classes; leave it out")
        self.check_dataset(info)

        def evaluate(model: nn.Module, env: DistributedContext) -> Evaluation:
            return Evaluation(self.evaluate(model, self.requested_batches(request), env))

        return evaluate

    def requested_batches(self, request: EvaluationRequest) -> EvalBatches:
        """Return the batches of the splits that a request names, one split after another."""
        return _JoinedBatches(
            [self.eval_stream(request.info, split, batch_size=request.batch_size) for split in request.splits]
        )

    def make_result(
        self, scores: dict[str, float], *, steps: int = 0, seen: int = 0, flops: int = 0, seconds: float = 0.0
    ) -> dict[str, Any]:
        """Return the result of a phase as it is stored and reported.

        Args:
            scores: The return value of :meth:`evaluate`.
            steps: Number of optimizer steps of the phase.
            seen: Number of units trained on; each view of a sample counts.
            flops: Training FLOPs.
            seconds: Training time.
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

    def example_output(self, model: nn.Module, env: DistributedContext) -> str | None:
        """Return an example of what the trained model puts out, as plain text, or None. Called on all ranks."""
        return None

    def preview(self, batch: Batch) -> Tensor | None:
        """Return a training batch as images ``[n, 3, H, W]`` in [0, 1] for TensorBoard, or None."""
        return None

    def artifact_metadata(self) -> dict[str, Any]:
        """Return what is needed to use the trained model in addition to its weights, as JSON values."""
        return {}

    @classmethod
    def artifact_settings(cls, model: ModelConfig, metadata: dict[str, Any]) -> Settings:
        """Return settings for evaluating a trained model, given the return value of :meth:`artifact_metadata`."""
        return Settings(model=model)


def _flatten(tables: dict[str, Any]) -> dict[str, Any]:
    """Return the value of each key of each table, as ``"table.key."``."""
    return {
        f"{name}.{key}.": value
        for name, table in tables.items()
        if isinstance(table, dict)
        for key, value in table.items()
    }
