"""Compare two ways by the differences of trials with the same seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .definition import Margin

Verdict = Literal["ahead", "not behind", "behind", "undecided"]

# quantiles 0.975 of Student's t distribution for 1 to 30 degrees of freedom
T_QUANTILES = [
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
]


@dataclass(frozen=True)
class PairedDifference:
    """The difference of the values of a way and its rival; lower values are better.

    Attributes:
        pairs: Number of seeds that both have.
        mean: Mean difference; negative if the way is better.
        low: Lower end of the 95% interval of the mean difference.
        high: Upper end of it.
        rival: Mean value of the rival.
        margin: How much worse the way may be without being behind.
    """

    pairs: int
    mean: float
    low: float
    high: float
    rival: float
    margin: Margin

    @property
    def verdict(self) -> Verdict:
        """Return ``ahead`` if the interval excludes zero, ``not behind`` if it excludes what is worse by the margin."""
        if self.high < 0:
            return "ahead"
        if self.high < self.margin.value * (1 if self.margin.absolute else self.rival):
            return "not behind"
        return "behind" if self.low > 0 else "undecided"


def compare_paired(way: Mapping[int, float], rival: Mapping[int, float], margin: Margin) -> PairedDifference | None:
    """Compare the values of two ways by seed.

    Args:
        way: Values of the way by seed.
        rival: Values of the rival by seed.
        margin: See `PairedDifference`.

    Returns:
        The comparison; None if fewer than two seeds are common to both, from which no interval follows.
    """
    seeds = sorted(way.keys() & rival.keys())
    if len(seeds) < 2:
        return None
    differences = [way[seed] - rival[seed] for seed in seeds]
    mean = statistics.mean(differences)
    quantile = T_QUANTILES[min(len(seeds) - 1, len(T_QUANTILES)) - 1]  # beyond the table: slightly too wide
    half = quantile * statistics.stdev(differences) / math.sqrt(len(seeds))
    rivals = statistics.mean(rival[seed] for seed in seeds)
    return PairedDifference(len(seeds), mean, mean - half, mean + half, rivals, margin)
