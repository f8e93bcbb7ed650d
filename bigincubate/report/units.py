"""Numbers as people read them: with a unit, and no digit that says nothing."""

from __future__ import annotations

from collections.abc import Iterable

from ..tasks.metric import Metric

PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
COARSE = 5000  # samples; a sample of fewer is more than 0.02%, and a second decimal would say nothing


def prefix(values: Iterable[float]) -> tuple[float, str]:
    """The factor and the sign in which the largest of ``values`` has one to three digits before the point."""
    largest = max(values, default=0)
    return next(((factor, sign) for factor, sign in PREFIXES if largest >= 0.9995 * factor), (1.0, ""))


def three(value: float) -> str:
    """Three digits that mean something: ``1.86``, ``36.6``, ``985``; and no fewer before the point."""
    decimals = 0 if value >= 99.95 or value == 0 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:,.{decimals}f}"


def quantity(value: float, unit: str) -> str:
    """``1856389201920, "FLOP"`` as ``1.86 TFLOP``."""
    factor, sign = prefix([value])
    return f"{three(value / factor)} {sign}{unit}".rstrip()


def percent(value: float, samples: int) -> str:
    """A share of so many samples, in percent: as many decimals as they can tell apart."""
    return f"{value:.{1 if samples < COARSE else 2}f}"


def measured(metric: Metric, value: float, samples: int) -> str:
    """A metric over so many samples."""
    return percent(value, samples) if metric.unit == "%" else metric.text(value)


def duration(seconds: float) -> str:
    """``58.9 s``, ``4 min 33 s``, ``3 h 05 min``, ``2 d 07 h``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"
