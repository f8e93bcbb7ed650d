"""Estimate how long a recipe takes on a cluster: counted FLOPs divided by measured throughput.

The GPUs are divided among the modules in proportion to their FLOPs. The critical path is the meta model on all GPUs,
the slowest module on its GPUs, and fine-tuning on all GPUs. FLOPs are counted exactly; the throughput of a GPU is
measured (by the phases of a run) or given by the user. Queues, startup, evaluation and scaling losses are not included.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..files import expand_path
from ..storage.run_directory import RunDir
from .planned_row import PlannedRow


@dataclass(frozen=True)
class ClusterSpec:
    """GPUs and their speed.

    Attributes:
        gpus: Number of GPUs.
        rates: Function that returns the achieved FLOP/s of one GPU in a phase.
    """

    gpus: int
    rates: Callable[[PlannedRow], float]


@dataclass(frozen=True)
class PhaseEstimate:
    """Duration of a phase.

    Attributes:
        key: Key of the phase.
        title: Name of the phase in tables.
        gpus: Number of GPUs.
        seconds: Training time.
    """

    key: str
    title: str
    gpus: int
    seconds: float


def parse_cluster(text: str) -> ClusterSpec:
    """Parse ``--cluster``.

    Args:
        text: ``nodes=64,gpus=8,tflops=200`` (TFLOP/s that one GPU achieves), or ``nodes=1,gpus=2,rates=RUN`` (use the
            throughput of the phases of a run, trained with one rank per phase).

    Raises:
        ConfigError: The text is invalid, or no phase of the run has finished.
    """
    pairs = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    patterns = {"nodes": r"[1-9]\d{0,8}", "gpus": r"[1-9]\d{0,8}", "tflops": r"\d{1,9}(\.\d{1,9})?", "rates": r".+"}
    one_rate = ("tflops" in pairs) ^ ("rates" in pairs)
    valid = one_rate and len(pairs) == len(text.split(",")) and pairs.keys() <= patterns.keys()
    if not valid or not all(re.fullmatch(patterns[key], value, re.ASCII) for key, value in pairs.items()):
        raise ConfigError(
            f"--cluster {text}: expected nodes=N,gpus=N and tflops=X (achieved by one GPU) or rates=RUN (measured by a"
            " run), such as nodes=64,gpus=8,tflops=200"
        )
    gpus = int(pairs.get("nodes", 1)) * int(pairs.get("gpus", 1))
    if "tflops" in pairs:
        if not (flops := 1e12 * float(pairs["tflops"])):
            raise ConfigError(f"--cluster {text}: tflops must be greater than 0")
        return ClusterSpec(gpus, lambda row: flops)
    measured = measured_flops_per_second(RunDir(expand_path(pairs["rates"])))

    def rate(row: PlannedRow) -> float:
        return measured.get(row.key) or measured.get(row.phase) or sum(measured.values()) / len(measured)

    return ClusterSpec(gpus, rate)


def measured_flops_per_second(run: RunDir) -> dict[str, float]:
    """Return the achieved FLOP/s of each finished phase of a run, by its key.

    Raises:
        ArtifactError: This is not a run directory.
        ConfigError: No phase has finished.
    """
    recipe = run.load_recipe()
    found = {}
    for row in run.planned_rows:
        result = run.phase(row["phase"], row["module"]).result
        if result and result["seconds"] and result["flops"]:
            found[row["key"]] = result["flops"] / result["seconds"]
    if not found:
        raise ConfigError(f"--cluster rates={run.path}: no phase of {recipe.name} has finished; use tflops=X")
    return found


def estimate_walltime(
    rows: Sequence[PlannedRow], cluster: ClusterSpec, fits: Callable[[PlannedRow, int], bool]
) -> list[PhaseEstimate]:
    """Return the duration of each phase. Modules share the GPUs; every other phase uses all of them.

    Args:
        rows: Rows of the plan.
        cluster: GPUs and their speed.
        fits: Function that returns whether a phase's batch can be divided among a number of ranks.
    """

    def seconds(row: PlannedRow, gpus: int) -> float:
        return row.total_flops / cluster.rates(row) / gpus

    def usable(row: PlannedRow) -> list[int]:
        return [n for n in range(1, cluster.gpus + 1) if n == 1 or fits(row, n)]

    modules = {row.key: row for row in rows if row.phase == "incubate"}
    shares, choices = dict.fromkeys(modules, 1), {key: usable(row) for key, row in modules.items()}
    while modules:  # give more GPUs to the slowest module until there are not enough left
        slowest = max(modules, key=lambda key: seconds(modules[key], shares[key]))
        larger = [n for n in choices[slowest] if n > shares[slowest]]
        if not larger or sum(shares.values()) - shares[slowest] + larger[0] > cluster.gpus:
            break
        shares[slowest] = larger[0]
    gpus = {row.key: shares.get(row.key) or usable(row)[-1] for row in rows}
    return [PhaseEstimate(row.key, row.title, gpus[row.key], seconds(row, gpus[row.key])) for row in rows]


def critical_path_seconds(estimates: Sequence[PhaseEstimate], gpus: int) -> float:
    """Return the seconds from the first step of the first phase to the last step of the last one.

    Modules train in parallel, all other phases one after another. If there are fewer GPUs than modules, the longest
    remaining module starts on the next free GPU.
    """
    modules = [phase for phase in estimates if phase.key.startswith("incubate/")]
    if sum(phase.gpus for phase in modules) <= gpus:
        incubation = max((phase.seconds for phase in modules), default=0.0)
    else:
        busy_until = [0.0] * gpus
        for phase in sorted(modules, key=lambda phase: -phase.seconds):
            heapq.heapreplace(busy_until, busy_until[0] + phase.seconds)
        incubation = max(busy_until)
    return incubation + sum(phase.seconds for phase in estimates if phase not in modules)
