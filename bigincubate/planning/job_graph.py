"""The jobs of a run and the order in which they may start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Phase
from ..tasks.metric import Metric
from .cost import PlannedRow


@dataclass(frozen=True)
class Job:
    """A phase to run.

    Attributes:
        key: The key of the phase, such as ``incubate/3``.
        title: The name of the phase for people.
        phase: The phase.
        module: Index of the module, for ``incubate`` only.
        needs: Keys of the jobs that must be done first.
        steps: Number of training steps.
        headline: The metric that the progress shows.
        unit: What a sample is called.
    """

    key: str
    title: str
    phase: Phase
    module: int | None
    needs: tuple[str, ...]
    steps: int
    headline: Metric
    unit: str


def build_job_graph(rows: Sequence[PlannedRow], *, baseline: bool) -> list[Job]:
    """Return the jobs of a plan, each with the jobs that it needs.

    The modules need the meta model, fine-tuning needs all modules, and the end-to-end baseline needs nothing.

    Args:
        rows: The planned phases.
        baseline: Whether to include the end-to-end baseline.
    """
    modules = tuple(row.key for row in rows if row.phase == "incubate")
    needs: dict[Phase, tuple[str, ...]] = {"pretrain": (), "incubate": ("pretrain",), "finetune": modules}
    return [
        Job(row.key, row.title, row.phase, row.module, needs.get(row.phase, ()), row.steps, row.metrics[0], row.unit)
        for row in rows
        if baseline or row.phase != "end_to_end"
    ]
