"""Names, titles, units and formats of metrics, so that reports can print the results of any task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import NonFiniteError


@dataclass(frozen=True)
class Metric:
    """A metric of an evaluation.

    Attributes:
        name: Key in results, and part of the key ``val/<name>`` in ``metrics.jsonl``.
        title: Name in tables, reports and TensorBoard.
        unit: Printed after the value, such as ``"%"``.
        higher_is_better: Whether larger values are better.
        format: Python format specifier of the value.
        in_tables: Whether tables have a column for it.
    """

    name: str
    title: str
    unit: str = ""
    higher_is_better: bool = True
    format: str = ".2f"
    in_tables: bool = True

    def text(self, value: float | None, *, unit: bool = False) -> str:
        """Format a value, with its unit if ``unit`` is true; None is formatted as ``"-"``."""
        if value is None:
            return "-"
        # a perplexity may have 300 digits
        number = f"{value:{self.format}}" if abs(value) < 1e12 or not math.isfinite(value) else f"{value:.3g}"
        return f"{number}{self.unit if unit else ''}"

    def interval_text(self, ends: tuple[float, float] | None) -> str:
        """Format the ends of an interval, such as ``"94.44 to 98.06"``; None is formatted as ``"-"``."""
        return " to ".join(map(self.text, ends)) if ends else "-"

    @property
    def column(self) -> str:
        """The heading of its table column, such as ``"top-1 %"``."""
        return f"{self.title} {self.unit}".strip()

    def value_in(self, result: Mapping[str, Any] | None) -> float | None:
        """Return the value in a result (see :meth:`.Task.make_result`), or None if there is none."""
        return result["metrics"].get(self.name) if result else None


def planned_metrics(row: Mapping[str, Any]) -> tuple[Metric, ...]:
    """Return the metrics of a phase, given its row of ``plan.json``; the first is the headline."""
    return tuple(Metric(**fields) for fields in row["metrics"])


def describe_metrics(
    metrics: Iterable[Metric],
    values: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """Format metrics in one line, such as ``top-1 96.39%, top-5 99.72%, loss 0.1538``.

    Args:
        metrics: The metrics.
        values: Their values, by name.
        intervals: Ends of intervals by name, printed after the value: ``top-1 96.39% (94.44 to 98.06)``.
    """
    return ", ".join(
        f"{metric.title} {metric.text(values[metric.name], unit=True)}"
        + (f" ({metric.interval_text(intervals[metric.name])})" if intervals and metric.name in intervals else "")
        for metric in metrics
    )


def check_finite_metrics(metrics: Iterable[Metric], values: Mapping[str, float], subject: str) -> None:
    """Check that the metrics of an evaluation are finite.

    Args:
        metrics: The metrics to check.
        values: Their values, by name.
        subject: What was evaluated, for the message.

    Raises:
        NonFiniteError: A metric is not finite.
    """
    for metric in metrics:
        if not math.isfinite(value := values[metric.name]):
            raise NonFiniteError(
                f"{subject}: {metric.title} is {value} on the validation split, so the model diverged or its inputs are"
                " not finite; lower train.lr, or check the data"
            )
