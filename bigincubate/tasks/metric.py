"""What a task measures: names, titles, units and formats, so that reports can print any task's results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation.

    Attributes:
        name: key in results, and the tag ``val/<name>`` in TensorBoard.
        title: how it is called in tables and pages.
        unit: printed after the value, such as ``"%"``.
        higher_is_better: whether a larger value is the better one.
        format: Python format of the value.
        in_tables: whether tables have a column for it.
    """

    name: str
    title: str
    unit: str = ""
    higher_is_better: bool = True
    format: str = ".2f"
    in_tables: bool = True

    def text(self, value: float | None, *, unit: bool = False) -> str:
        """Return a value as text, ``"-"`` for None; with ``unit`` its unit follows."""
        if value is None:
            return "-"
        return f"{value:{self.format}}{self.unit if unit else ''}"

    @property
    def column(self) -> str:
        """The heading of a column of such values, such as ``"top-1 %"``."""
        return f"{self.title} {self.unit}".strip()

    def value_in(self, result: Mapping[str, Any] | None) -> float | None:
        """Return the value in a result (:meth:`.Task.make_result`); None: there is none."""
        value: float | None = result["metrics"].get(self.name) if result else None
        return value


def planned_metrics(row: Mapping[str, Any]) -> tuple[Metric, ...]:
    """Return the metrics of a phase, given its row of ``plan.json``; the first is the headline."""
    return tuple(Metric(**fields) for fields in row["metrics"])


def describe_metrics(metrics: Iterable[Metric], values: Mapping[str, float]) -> str:
    """Return metrics in one line, such as ``top-1 96.39%, top-5 99.72%, loss 0.1538``."""
    return ", ".join(f"{metric.title} {metric.text(values[metric.name], unit=True)}" for metric in metrics)
