"""How long a recipe takes on a cluster: counted FLOPs over measured rates, GPUs shared out by FLOPs.

The critical path is the meta model on all GPUs, then the slowest module on its own, then fine-tuning on all. What is
computed is counted exactly; what a GPU achieves is what was measured (a run's phases, or a number that a user gives);
queues, the start of a job, evaluation and a scaling that is less than linear are not in it.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError
from .plan import PlannedRow
from .rundir import RunDir
from .seeds import phase_key


@dataclass(frozen=True)
class Cluster:
    """``rates``: FLOP/s of one GPU, by the key of a phase."""

    gpus: int
    rates: Callable[[PlannedRow], float]


@dataclass(frozen=True)
class Estimate:
    """A phase on its share of the cluster."""

    key: str
    title: str
    gpus: int
    seconds: float

    @property
    def gpu_seconds(self) -> float:
        return self.gpus * self.seconds


def read_cluster(text: str) -> Cluster:
    """``nodes=64,gpus=8,tflops=200`` (achieved, of one GPU), or ``nodes=1,gpus=2,rates=RUN``: what the phases of a run
    with one rank each achieved.

    Raises:
        ConfigError: anything else; or the run has finished no phase.
    """
    pairs = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    known = {"nodes": r"[1-9]\d*", "gpus": r"[1-9]\d*", "tflops": r"\d+(\.\d+)?", "rates": r".+"}
    one_rate = ("tflops" in pairs) ^ ("rates" in pairs)
    good = one_rate and len(pairs) == len(text.split(",")) and pairs.keys() <= known.keys()
    if not good or not all(re.fullmatch(known[key], value) for key, value in pairs.items()):
        raise ConfigError(
            f"--cluster {text}: expected nodes=N,gpus=N and tflops=X (what one GPU achieves) or rates=RUN (a run to"
            " take it from), such as nodes=64,gpus=8,tflops=200"
        )
    gpus = int(pairs.get("nodes", 1)) * int(pairs.get("gpus", 1))
    if "tflops" in pairs:
        if not (flops := 1e12 * float(pairs["tflops"])):
            raise ConfigError(f"--cluster {text}: tflops = 0 never ends")
        return Cluster(gpus, lambda row: flops)
    measured = measured_rates(RunDir(Path(pairs["rates"])))

    def rate(row: PlannedRow) -> float:
        return measured.get(row.key) or measured.get(row.phase) or sum(measured.values()) / len(measured)

    return Cluster(gpus, rate)


def measured_rates(run: RunDir) -> dict[str, float]:
    """FLOP/s that each finished phase of a run achieved, by its key.

    Raises:
        ArtifactError: not a run directory. ConfigError: no phase of it has trained.
    """
    recipe = run.recipe()
    modules = len(list((run.path / "modules").glob("[0-9]*")))
    phases = [("pretrain", None), *(("incubate", k) for k in range(modules)), ("finetune", None), ("end_to_end", None)]
    found = {}
    for phase, module in phases:
        result = run.phase(phase, module).result  # type: ignore[arg-type]
        if result and result["seconds"] and result["flops"]:
            found[phase_key(phase, module)] = result["flops"] / result["seconds"]
    if not found:
        raise ConfigError(f"--cluster rates={run.path}: no phase of {recipe.name} has finished there")
    return found


def estimate(rows: Sequence[PlannedRow], cluster: Cluster, fits: Callable[[PlannedRow, int], bool]) -> list[Estimate]:
    """Every phase on its GPUs: the modules share them, the others have all.

    Args:
        fits: whether a row's batch can be cut over that many ranks.
    """

    def seconds(row: PlannedRow, gpus: int) -> float:
        return row.total_flops / cluster.rates(row) / gpus

    def usable(row: PlannedRow) -> list[int]:
        return [n for n in range(1, cluster.gpus + 1) if n == 1 or fits(row, n)]

    modules = {row.key: row for row in rows if row.phase == "incubate"}
    shares, steps = dict.fromkeys(modules, 1), {key: usable(row) for key, row in modules.items()}
    while True:  # the next GPUs go to the module that would take longest, until they no longer suffice for it
        slowest = max(modules, key=lambda key: seconds(modules[key], shares[key]))
        larger = [n for n in steps[slowest] if n > shares[slowest]]
        if not larger or sum(shares.values()) - shares[slowest] + larger[0] > cluster.gpus:
            break
        shares[slowest] = larger[0]
    on = {row.key: shares.get(row.key) or usable(row)[-1] for row in rows}
    return [Estimate(row.key, row.title, on[row.key], seconds(row, on[row.key])) for row in rows]


def critical_path(estimates: Sequence[Estimate], gpus: int) -> float:
    """Seconds from the first step to the last: meta model, modules beside each other (in turns, the longest first,
    where there are fewer GPUs than modules), fine-tuning."""
    slots = [0.0] * gpus
    modules = [each for each in estimates if each.key.startswith("incubate/")]
    if sum(each.gpus for each in modules) <= gpus:
        beside = max(each.seconds for each in modules)
    else:
        for each in sorted(modules, key=lambda each: -each.seconds):
            heapq.heapreplace(slots, slots[0] + each.seconds)
        beside = max(slots)
    return beside + sum(each.seconds for each in estimates if each.key in ("pretrain", "finetune"))
