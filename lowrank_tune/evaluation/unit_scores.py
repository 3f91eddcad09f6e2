"""Scores of single validation rows, pairs or questions, and whether two steps differ in them by more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MIN_UNITS = 2
"""With fewer units a difference has no standard error."""


@dataclass(frozen=True)
class UnitScores:
    """The score of each unit, of which a higher one is better, and its weight in their mean. `name`: what the units
    are, as a plural."""

    name: str
    scores: list[float]
    weights: list[float]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of held-out rows, pairs or questions; `units` is None for an algorithm without losses of single ones."""

    metrics: dict[str, float]
    units: UnitScores | None = None


@dataclass(frozen=True)
class PairedDifference:
    """The mean of the differences of `units` units between two steps, and its standard error (inf for one unit)."""

    mean: float
    stderr: float
    units: int

    @property
    def is_positive(self) -> bool:
        """Whether the first step is better by more than the standard error; never with fewer than two units."""
        return self.mean > self.stderr


def paired_difference(
    scores: Sequence[float],
    earlier: Sequence[float],
    weights: Sequence[float],
) -> PairedDifference:
    """Returns the difference of two measurements of the same units.

    The mean of weighted differences is a ratio of sums, sum(w d) / sum(w). Its standard error is that of the residuals
    w (d - mean), which for equal weights is the standard deviation of the differences by the square root of their
    number (Cochran, Sampling Techniques, 3rd edition, equation 2.39).
    """
    terms = [(score - other, weight) for score, other, weight in zip(scores, earlier, weights, strict=True) if weight]
    units = len(terms)
    if units == 0:
        return PairedDifference(math.nan, math.inf, 0)
    total = math.fsum(weight for _, weight in terms)
    mean = math.fsum(weight * difference for difference, weight in terms) / total
    if units < MIN_UNITS:
        return PairedDifference(mean, math.inf, units)
    squares = math.fsum((weight * (difference - mean)) ** 2 for difference, weight in terms)
    return PairedDifference(mean, math.sqrt(units / (units - 1) * squares) / total, units)
