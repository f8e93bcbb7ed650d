"""The jobs of a run and the order in which they may start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Phase
from .planned_row import PlannedRow


@dataclass(frozen=True)
class Job(PlannedRow):
    """A phase to run.

    Attributes:
        needs: Keys of the jobs that must finish first.
    """

    needs: tuple[str, ...] = ()


def build_job_graph(rows: Sequence[PlannedRow], *, baseline: bool) -> list[Job]:
    """Return the jobs of a plan with their dependencies.

    Modules need the meta model, fine-tuning needs the meta model and all modules that are incubated, and the end-to-end
    baseline needs no other job. If a finished model is fine-tuned, the plan has only the last two.

    Args:
        rows: The planned phases.
        baseline: Whether to include the end-to-end baseline.
    """
    before = tuple(row.key for row in rows if row.phase in ("pretrain", "incubate"))
    needs: dict[Phase, tuple[str, ...]] = {"incubate": ("pretrain",), "finetune": before}
    return [Job(**vars(row), needs=needs.get(row.phase, ())) for row in rows if baseline or row.phase != "end_to_end"]
