"""What a task measures: names, titles, units and formats, so that reports can print any task's results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation.

    Attributes:
        name: key in results, and the tag ``val/<name>`` in TensorBoard.
        title: how it is called in tables and pages.
        unit: printed after the value, such as ``"%"``.
        higher_is_better: whether a larger value is the better one.
        format: Python format of the value.
    """

    name: str
    title: str
    unit: str = ""
    higher_is_better: bool = True
    format: str = ".2f"

    def text(self, value: float | None, *, unit: bool = False) -> str:
        """Return a value as text, ``"-"`` for None; with ``unit`` its unit follows."""
        if value is None:
            return "-"
        return f"{value:{self.format}}{self.unit if unit else ''}"

    @property
    def column(self) -> str:
        """The heading of a column of such values, such as ``"top-1 %"``."""
        return f"{self.title} {self.unit}".strip()


def describe_metrics(metrics: Iterable[Metric], values: Mapping[str, float]) -> str:
    """Return metrics in one line, such as ``top-1 96.39%, top-5 99.72%, loss 0.1538``."""
    return ", ".join(f"{metric.title} {metric.text(values[metric.name], unit=True)}" for metric in metrics)
