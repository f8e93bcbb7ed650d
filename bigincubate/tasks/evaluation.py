"""Requests and results of the evaluation of finished models, and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.dataset import SPLITS, DatasetInfo
from .metric import Metric, describe_metrics

if TYPE_CHECKING:
    from torch import nn

    from ..distributed.process_group import DistributedContext

RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)  # the ends of a 95% interval


@dataclass(frozen=True)
class EvaluationRequest:
    """How to evaluate a finished model on a data set.

    Attributes:
        info: The data set.
        batch_size: Batch size.
        records: Properties of the records that the model was trained on, such as the names of classes, if known.
        classes: A file that maps the classes of the data to those of the model; None without one.
        per_class: Whether to return the score of each class.
        probe: Evaluate the model's features with this classifier instead; None to evaluate the model.
        split: The split: ``"val"``, ``"train"``, or ``"all"`` for both.
    """

    info: DatasetInfo
    batch_size: int
    records: Mapping[str, Any] = field(default_factory=dict)
    classes: Path | None = None
    per_class: bool = False
    probe: str | None = None
    split: str = "val"

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits whose samples are evaluated."""
        return SPLITS if self.split == "all" else (self.split,)


@dataclass(frozen=True)
class ClassScore:
    """The score of the samples of one class.

    Attributes:
        name: Name of the class.
        samples: Number of its samples.
        score: The headline metric over them.
        wrong: The class that was wrongly predicted most often; None if all predictions are right.
        wrong_samples: Number of those predictions.
    """

    name: str
    samples: int
    score: float
    wrong: str | None = None
    wrong_samples: int = 0


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        scores: Metrics by name, and ``samples``.
        intervals: Lower and upper end of the 95% interval of a metric, by name.
        per_class: The score of each class that has samples, if requested.
        matching: How the classes of the data were matched with those of the model, if they are not the same.
    """

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_class: list[ClassScore] | None = None
    matching: str = ""


Evaluator = Callable[["nn.Module", "DistributedContext"], Evaluation]


@dataclass(frozen=True)
class DatasetEvaluation:
    """The evaluation of a model on one data set, with everything that is needed to print it.

    Attributes:
        data: The data set, as the user specified it.
        request: The request.
        result: The result.
        metrics: The metrics in it; the first is the headline.
        unit: What ``samples`` counts.
    """

    data: str | Path
    request: EvaluationRequest
    result: Evaluation
    metrics: Sequence[Metric]
    unit: str

    @property
    def split(self) -> str:
        """The splits, to be printed after the name of the data; empty for the validation split."""
        return {"val": "", "train": ", training split", "all": ", both splits"}[self.request.split]

    def describe(self) -> str:
        """Return the scores in one line."""
        scores = describe_metrics(self.metrics, self.result.scores, self.result.intervals)
        method = f" ({self.request.probe} probe)" if self.request.probe else ""
        matching = f" ({self.result.matching})" if self.result.matching else ""
        return f"{scores}{method} on {self.result.scores['samples']} {self.unit} of {self.data}{self.split}{matching}"

    def values(self) -> dict[str, Any]:
        """Return the result as plain values: the scores by name, and all other parts of the result."""
        result = self.result
        values: dict[str, Any] = dict(result.scores)
        if self.request.split != "val":
            values["split"] = self.request.split
        if result.intervals:
            values["intervals"] = {name: list(ends) for name, ends in result.intervals.items()}
        if result.matching:
            values["matching"] = result.matching
        if result.per_class is not None:
            values["per_class"] = [asdict(each) for each in result.per_class]
        return values


def bootstrap_intervals(outcomes: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return 95% percentile bootstrap intervals of means: ``[k, 2]``, lower and upper ends.

    Args:
        outcomes: The outcome of each sample, ``[n, k]``; all columns are resampled together.
        resamples: Number of times that n samples are drawn with replacement.
        seed: The seed of the draws.
    """
    draws, count = np.random.default_rng(seed), len(outcomes)
    means = [outcomes[draws.integers(count, size=count)].sum(axis=0) / count for _ in range(resamples)]
    return np.percentile(means, PERCENTILES, axis=0).T
