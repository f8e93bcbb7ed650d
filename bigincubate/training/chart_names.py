"""Names of the charts in TensorBoard.

TensorBoard sorts charts by name and groups them by the part before the first slash. The groups ``train`` and ``val``
must come first, so the names of all other groups are later in the alphabet. The keys of ``metrics.jsonl`` stay short.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..tasks.metric import Metric

IMAGES = "visual inputs/after augmentation"
WHOLE_RUN = "whole run"  # one curve per phase
PARTIAL = "with finished modules"  # scores of partial assemblies
COMPUTING = "workload"  # speed, memory and checkpoints
NAMES = {
    "train/lr": "train/optimizer: learning rate",
    "train/grad_norm": "train/optimizer: gradient norm",
    "train/skipped": "train/optimizer: skipped steps",
    "train/gain": "train/optimizer: AdaScale gain",
    "perf/gflops": f"{COMPUTING}/GFLOP per second",
    "perf/mfu": f"{COMPUTING}/model FLOPs utilization",
    "perf/data_wait": f"{COMPUTING}/fraction of time waiting for data",
    "perf/slowest_rank_ratio": f"{COMPUTING}/slowest rank, time over median",
    "memory/peak_gib": f"{COMPUTING}/peak memory (GiB)",
    "checkpoint/blocked_ms": f"{COMPUTING}/checkpoint, training blocked (ms)",
    "checkpoint/mib_per_sec": f"{COMPUTING}/checkpoint, MiB per second",
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
