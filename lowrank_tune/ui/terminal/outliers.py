"""Single values far from all others, because of which a curve would fill only a small part of its chart."""

from __future__ import annotations

import math

from lowrank_tune.ui.metrics import Points

MIN_POINTS = 20
MAX_SHARE = 0.03
"""Share of the points that may be outliers; one may always be."""
START_SHARE = 0.05
"""Share of the points that are the start of the curve. A loss that falls from a high start has no outliers."""
MIN_START_POINTS = 3
MIN_DISTANCE = 3.0
"""Distance from the other values, in their range."""
MAX_ADJACENT = 2
"""Outliers next to each other. More of them are a part of the curve."""


def split_outliers(points: Points) -> tuple[Points, Points]:
    """Returns the points without outliers, and the outliers."""
    values = [y for _, y in points]
    if not math.isfinite(sum(values)):
        points = [point for point in points if math.isfinite(point[1])]
        values = [y for _, y in points]
    far = _far_indices(values)
    if not far:
        return points, ()
    bulk = [point for index, point in enumerate(points) if index not in far]
    return bulk, [points[index] for index in sorted(far)]


def _far_indices(values: list[float]) -> set[int]:
    count = len(values)
    if count < MIN_POINTS:
        return set()
    most = max(1, int(MAX_SHARE * count))
    ordered = sorted(values)
    distance = MIN_DISTANCE * (ordered[-1 - most] - ordered[most])
    low, high = ordered[most] - distance, ordered[-1 - most] + distance
    # a constant has no range to compare with
    if distance == 0 or low <= ordered[0] and ordered[-1] <= high:
        return set()
    far = {index for index, value in enumerate(values) if not low <= value <= high}
    start = max(MIN_START_POINTS, int(START_SHARE * count))
    if len(far) > most or any(index < start for index in far) or _longest_run(far) > MAX_ADJACENT:
        return set()
    return far


def _longest_run(indices: set[int]) -> int:
    """Returns how many of the indices follow each other at most."""
    longest = 0
    for index in indices:
        if index - 1 not in indices:
            end = index
            while end in indices:
                end += 1
            longest = max(longest, end - index)
    return longest
