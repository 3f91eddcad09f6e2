"""A curve in two or one figures: the report and the comparison have the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from lowrank_tune.ui.formatting import format_metric

ARROW = " \u2192 "
PART = 10
"""A first or last value is the mean over a tenth of the run, because single steps differ by chance."""


def first_and_last(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of the first and of the last tenth of a curve that is not empty."""
    count = max(1, len(values) // PART)
    return fmean(values[:count]), fmean(values[-count:])


def trend(
    metric: str,
    values: Sequence[float],
) -> str:
    """Returns the mean of the first and of the last tenth of a curve in words, empty without values."""
    if not values:
        return ""
    first, last = first_and_last(values)
    return f"{format_metric(metric, first)}{ARROW}{format_metric(metric, last)}"
