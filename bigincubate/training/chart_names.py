"""Names of the charts in TensorBoard.

TensorBoard sorts charts by name and groups them by the part before the first slash. The groups ``train`` and ``val``
must come first, so the names of all other groups are later in the alphabet; likewise the loss in ``train``. Names of at
most 27 characters are shown in full. The keys of ``metrics.jsonl`` are independent of the names.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..tasks.metric import Metric

IMAGES = "visual inputs/augmented"
WHOLE_RUN = "whole run"  # one curve per phase
PARTIAL = "whole model"  # scores of partial assemblies, over the number of finished modules
COMPUTING = "work"  # speed, memory and checkpoints
NAMES = {
    "train/lr": "train/step: learning rate",
    "train/grad_norm": "train/step: gradient norm",
    "train/skipped": "train/steps skipped",
    "train/gain": "train/step: AdaScale gain",
    "perf/gflops": f"{COMPUTING}/GFLOP per second",
    "perf/mfu": f"{COMPUTING}/FLOPs utilization",
    "perf/data_wait": f"{COMPUTING}/data wait (fraction)",
    "perf/slowest_rank_ratio": f"{COMPUTING}/slowest rank ratio",
    "memory/peak_gib": f"{COMPUTING}/peak memory (GiB)",
    "checkpoint/blocked_ms": f"{COMPUTING}/checkpoint wait (ms)",
    "checkpoint/mib_per_sec": f"{COMPUTING}/checkpoint (MiB/s)",
}


def name_chart(key: str, metrics: Iterable[Metric]) -> str:
    """Return the name of the chart of a key of ``metrics.jsonl``.

    Args:
        key: The key, such as ``train/lr``, ``val/top1`` or ``perf/images_per_sec``.
        metrics: The metrics of the phase.
    """
    if key in NAMES:
        return NAMES[key]
    group, _, name = key.partition("/")
    if group == "val":
        return name_metric_chart("val", name, metrics)
    name = name.replace("_per_sec", " per second").replace("_", " ")
    return f"{group if group == 'train' else COMPUTING}/{name}"


def name_metric_chart(group: str, name: str, metrics: Iterable[Metric]) -> str:
    """Return the name of the chart of a metric, such as ``val/top-1 (%)``.

    Args:
        group: The group of the chart.
        name: The name of the metric.
        metrics: The metrics of the phase.
    """
    metric = next((metric for metric in metrics if metric.name == name), Metric(name, name))
    return f"{group}/{metric.title}" + (f" ({metric.unit})" if metric.unit else "")
