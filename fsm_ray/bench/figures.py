"""The arithmetic of the benchmark: percentiles, medians over rounds, spreads and ratios. No I/O, no clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One quantity, measured once a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the rounds: one disturbed round does not move it."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Half the distance from the lowest to the highest round, as a share of the median.

        >>> Figure((90.0, 100.0, 120.0)).spread
        0.15
        """
        return (max(self.rounds) - min(self.rounds)) / 2 / self.median if self.median else 0.0


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that is not below the given share of all (nearest rank).

    >>> percentile([30, 10, 20, 40], 0.5)
    20
    """
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def ratio(numerator: Figure | None, denominator: Figure | None) -> float | None:
    """The median over rounds of numerator / denominator, or `None` where one of them is missing.

    Paired round by round, because what slows the machine for one round slows both.

    >>> ratio(Figure((100.0, 50.0, 80.0)), Figure((10.0, 5.0, 10.0)))
    10.0
    """
    if numerator is None or denominator is None:
        return None
    pairs = zip(numerator.rounds, denominator.rounds, strict=True)
    return statistics.median(above / below for above, below in pairs)
