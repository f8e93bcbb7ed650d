"""Format numbers with units and significant digits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime, tzinfo

from ..tasks.metric import Metric

PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
COARSE = 5000  # with fewer samples, one sample is more than 0.02%, so the second decimal is not significant


def choose_prefix(values: Iterable[float]) -> tuple[float, str]:
    """Return the factor and SI prefix for which the largest value has one to three digits before the decimal point."""
    largest = max(values, default=0)
    return next(((factor, sign) for factor, sign in PREFIXES if largest >= 0.9995 * factor), (1.0, ""))


def format_flops_column(values: Sequence[float], digits: int = 4) -> tuple[str, list[str]]:
    """Return the unit of a column of FLOPs, up to ``PFLOPs``, chosen by the largest value, and the cells."""
    factor, sign = choose_prefix(min(value, 1e17) for value in values)
    scaled = [value / factor for value in values]
    return f"{sign}FLOPs", [f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}" for value in scaled]


def format_three_digits(value: float) -> str:
    """Format a value with three significant digits, such as ``1.86``, ``36.6`` or ``985``; integers keep all digits."""
    decimals = 0 if value >= 99.95 or value == 0 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:,.{decimals}f}"


def format_quantity(value: float, unit: str) -> str:
    """Format a value with a unit and an SI prefix: ``1856389201920, "FLOP"`` as ``1.86 TFLOP``."""
    factor, sign = choose_prefix([value])
    return f"{format_three_digits(value / factor)} {sign}{unit}".rstrip()


def format_percent(value: float, samples: int) -> str:
    """Format a percentage of ``samples`` samples with its significant decimals."""
    return f"{value:.{1 if samples < COARSE else 2}f}"


def format_metric(metric: Metric, value: float, samples: int) -> str:
    """Format the value of a metric that was measured on ``samples`` samples."""
    return format_percent(value, samples) if metric.unit == "%" else metric.text(value)


def format_time(seconds: float, zone: tzinfo | None = None) -> str:
    """Format a Unix time in a zone, by default the local one, such as ``2026-03-01 14:05:09``."""
    try:
        return f"{datetime.fromtimestamp(seconds, zone):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):  # it is damaged
        return "unknown"


def format_duration(seconds: float) -> str:
    """Format seconds, such as ``58.9 s``, ``4 min 33 s``, ``3 h 05 min`` or ``2 d 07 h``."""
    if not math.isfinite(seconds):  # a measured rate is damaged
        return "unknown"
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
