"""Evaluate a finished model on prepared data, in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from ..config import DataConfig
from ..data.dataset import open_dataset
from ..distributed.process_group import DistributedContext, restored_rank_variables
from ..errors import ConfigError, check_integer
from ..files import expand_path
from ..interchange.export import load_model
from ..tasks.evaluation import DatasetEvaluation, EvaluationRequest
from ..tasks.metric import check_finite_metrics
from ..tasks.registry import task_class

ClassFiles: TypeAlias = str | Path | Sequence[str | Path | None] | None


def evaluate_model(
    source: str | Path,
    data: Sequence[str | Path],
    *,
    batch_size: int = 256,
    probe: str | None = None,
    classes: ClassFiles = None,
    per_class: bool = False,
    split: str | Sequence[str] = "val",
) -> Iterator[DatasetEvaluation]:
    """Evaluate a model on data sets one after another. All data sets are checked first.

    Args:
        source: A run directory, the folder of a phase, an artifact, or an exported folder.
        data: The data sets.
        batch_size: Batch size.
        probe: The classifier to fit to the model's features instead; None to evaluate the model.
        classes: The file that says which classes of the model the labels mean, or one, or None, for each data set.
        per_class: Whether to score each class.
        split: The split: ``"val"``, ``"train"``, or ``"all"`` for both; or one for each data set.

    Yields:
        The result of each data set.

    Raises:
        ArtifactError: ``source`` has no complete model.
        ConfigError: The data does not fit the model, or the task cannot do what is asked for.
        DataError: The data is missing or damaged.
        NonFiniteError: A weight or a metric is not finite.
    """
    if probe not in (None, "linear", "knn"):
        raise ConfigError(f"probe = {probe!r}: expected linear or knn")
    check_integer("batch_size", batch_size)
    splits = [split] if isinstance(split, str) else list(split)
    if wrong := next((name for name in splits if name not in ("val", "train", "all")), None):
        raise ConfigError(f"split = {wrong!r}: expected val, train or all")
    files = [classes] if classes is None or isinstance(classes, str | os.PathLike) else list(classes)
    if not data:
        raise ConfigError("there is no data set; name at least one")
    for what, count in (("files of classes", len(files)), ("splits", len(splits))):
        if count not in (1, len(data)):
            raise ConfigError(f"{len(data)} data sets, but {count} {what}; give one, or one for each data set")
    splits *= len(data) // len(splits)
    paths = [None if file is None else expand_path(file) for file in files] * (len(data) // len(files))
    model, spec = load_model(expand_path(source))
    task_type = task_class(spec.task.name)
    settings = task_type.artifact_settings(spec.model, spec.metadata).model_copy(update={"task": spec.task})
    task = task_type(settings, DataConfig())
    requests = [
        EvaluationRequest(open_dataset(expand_path(path)), batch_size, spec.records, file, per_class, probe, own)
        for path, file, own in zip(data, paths, splits, strict=True)
    ]
    evaluators = [task.evaluator(request) for request in requests]
    with restored_rank_variables():
        env = DistributedContext.single_process()
        model.to(env.device)
        for path, request, evaluate in zip(data, requests, evaluators, strict=True):
            result = evaluate(model, env)
            metrics = [metric for metric in task.metrics if metric.name in result.scores]
            check_finite_metrics(metrics, result.scores, str(source))
            yield DatasetEvaluation(path, request, result, metrics, task.unit)
