"""Slopes of measured series: Theil-Sen with a 95 % interval of a block bootstrap, and what growth is acceptable."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLOCKS, RESAMPLES, SEED = 100, 400, 0
"""A series is reduced to the medians of at most so many neighboring parts before its slope is computed: pairs of single
points are too many, and a median does not see rare slow steps. Resampled are runs of `RUN` neighbors, which keeps what
is periodic (checkpoints, thinned series)."""
RUN = 5


@dataclass(frozen=True)
class Slope:
    """`per_1000` in units of the series per 1,000 steps, with its interval; `growth` is the change over the measured
    steps by that slope, relative to `level`, the median of the series; infinite if that is 0. Without a bound the slope
    is not judged."""

    name: str
    unit: str
    points: int
    level: float
    per_1000: float
    low: float
    high: float
    growth: float
    bound: float | None

    @property
    def is_flat(self) -> bool:
        """Whether the interval contains 0 or the growth is below its bound."""
        return self.bound is None or self.low <= 0 <= self.high or self.growth < self.bound


def measure_slope(name: str, unit: str, steps: list[float], values: list[float], bound: float | None) -> Slope:
    """Returns the slope of `values` over `steps`, which increase. `bound`: relative growth that is acceptable."""
    x, y = _thinned(np.asarray(steps, dtype=np.float64)), _thinned(np.asarray(values, dtype=np.float64))
    slope = theil_sen(x, y)
    low, high = bootstrap_interval(x, y, slope)
    level = float(np.median(y))
    change = slope * float(x[-1] - x[0])
    if level:
        growth = change / level
    else:
        growth = math.copysign(math.inf, change) if change else 0.0
    return Slope(
        name=name,
        unit=unit,
        points=len(values),
        level=level,
        per_1000=1000 * slope,
        low=1000 * low,
        high=1000 * high,
        growth=growth,
        bound=bound,
    )


@dataclass(frozen=True)
class Ratio:
    """The median ratio of the times of an old process and of a fresh one, with its 95 % interval."""

    name: str
    points: int
    middle: float
    low: float
    high: float
    bound: float

    @property
    def is_flat(self) -> bool:
        """Whether the interval contains 1 or the old process is slower by less than the bound."""
        return self.low <= 1 <= self.high or self.middle < 1 + self.bound


def measure_ratio(name: str, ratios: list[float], bound: float) -> Ratio:
    """Returns the median of ratios of neighboring steps. Runs of `RUN` neighbors are resampled."""
    values = np.asarray(ratios, dtype=np.float64)
    numbers = np.random.default_rng(SEED)
    medians = [np.median(values[_resampled(numbers, len(values))]) for _ in range(RESAMPLES)]
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(
        name=name,
        points=len(values),
        middle=float(np.median(values)),
        low=float(low),
        high=float(high),
        bound=bound,
    )


def theil_sen(x: Floats, y: Floats) -> float:
    """Returns the median of the slopes of all pairs of points."""
    first, second = np.triu_indices(len(x), 1)
    distances = x[second] - x[first]
    apart = distances != 0
    return float(np.median((y[second] - y[first])[apart] / distances[apart]))


def bootstrap_interval(x: Floats, y: Floats, slope: float) -> tuple[float, float]:
    """Returns the 95 % interval of the slope: residuals are drawn again in runs of neighbors."""
    numbers = np.random.default_rng(SEED)
    residuals = y - slope * x
    slopes = []
    for _ in range(RESAMPLES):
        places = _resampled(numbers, len(x))
        slopes.append(theil_sen(x, slope * x + residuals[places]))
    low, high = np.percentile(slopes, [2.5, 97.5])
    return float(low), float(high)


def _resampled(numbers: np.random.Generator, size: int) -> NDArray[np.int64]:
    """Returns the places of a bootstrap sample: runs of neighbors, drawn with replacement."""
    run = min(RUN, size)
    starts = numbers.integers(0, size - run + 1, size=-(-size // run))
    return (starts[:, None] + np.arange(run)).ravel()[:size]


def _thinned(values: Floats) -> Floats:
    return np.asarray([np.median(part) for part in np.array_split(values, min(BLOCKS, len(values)))])


def table(slopes: list[Slope]) -> str:
    """Returns the slopes as rows of a table in Markdown."""
    lines = ["| | level | slope per 1,000 steps (95 %) | growth | bound | |", "|---|---|---|---|---|---|"]
    for each in slopes:
        bound = "" if each.bound is None else f"{each.bound:.0%}"
        verdict = _verdict(each.is_flat) if bound else "not judged"
        interval = f"{each.per_1000:+.3g} ({each.low:+.3g} to {each.high:+.3g})"
        lines.append(
            f"| {each.name} ({each.unit}) | {each.level:.4g} | {interval} | {each.growth:+.2%} | {bound} | {verdict} |"
        )
    return "\n".join(lines)


def ratio_table(ratios: list[Ratio]) -> str:
    """Returns the ratios as rows of a table in Markdown."""
    lines = ["| old process / fresh process | ratio (95 %) | steps | bound | |", "|---|---|---|---|---|"]
    for each in ratios:
        verdict = _verdict(each.is_flat)
        interval = f"{each.middle:.3f} ({each.low:.3f} to {each.high:.3f})"
        lines.append(f"| {each.name} | {interval} | {each.points} | {1 + each.bound:.2f} | {verdict} |")
    return "\n".join(lines)


def _verdict(is_flat: bool) -> str:
    return "flat" if is_flat else "**grows**"
