"""Losses of single validation pairs, and whether two steps differ in them by more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

MIN_PAIRS = 2
"""With fewer pairs a difference has no standard error."""


@dataclass(frozen=True)
class ValidationResult:
    """Metrics of validation rows, and the loss of each validation pair; empty without pairs."""

    metrics: dict[str, float]
    pair_losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class PairedDifference:
    """By how much the loss of one step is lower than that of another: mean over `pairs` pairs, and its standard error,
    which is inf for one pair."""

    mean: float
    stderr: float
    pairs: int

    @property
    def is_positive(self) -> bool:
        """Whether the loss is lower by more than the standard error; never with fewer than two pairs."""
        return self.mean > self.stderr


def paired_difference(losses: Sequence[float], earlier: Sequence[float]) -> PairedDifference:
    """Returns by how much the losses of some pairs are lower than those of the same pairs at an earlier step."""
    differences = [other - loss for loss, other in zip(losses, earlier, strict=True)]
    pairs = len(differences)
    mean = fmean(differences)
    if pairs < MIN_PAIRS:
        return PairedDifference(mean, math.inf, pairs)
    if not all(map(math.isfinite, differences)):
        return PairedDifference(math.nan, math.nan, pairs)
    return PairedDifference(mean, stdev(differences) / math.sqrt(pairs), pairs)
