"""Axes of the SVG charts: their range, and the values that are labeled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowrank_tune.ui.formatting import format_tick, percent_tick


@dataclass(frozen=True)
class Axis:
    """The range of values along one side of a plot, and the values that are labeled."""

    low: float
    high: float
    ticks: Sequence[float] = ()
    log: bool = False
    format_label: Callable[[float], str] = format_tick

    def share(self, value: float) -> float:
        """Returns where `value` is on the axis: 0 at its beginning, 1 at its end."""
        if self.log:
            return math.log10(value / self.low) / math.log10(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def labels(self) -> list[tuple[float, str]]:
        """Returns the ticks within the range, each with its label."""
        return [(tick, self.format_label(tick)) for tick in self.ticks if self.low <= tick <= self.high]


def linear_axis(
    values: Sequence[float],
    count: int = 5,
) -> Axis:
    """Returns an axis over the values with about `count` round ticks."""
    low = min(values)
    high = max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low -= abs(low) / 2 if low else 1.0
        high += abs(high) / 2 if high else 1.0
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    steps = [power * factor for factor in (1, 2, 2.5, 5, 10)]
    step = next(step for step in steps if step * count >= high - low)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    if step > 1e-9:
        ticks = [round(tick, 12) for tick in ticks]
    return Axis(
        ticks[0],
        ticks[-1],
        ticks,
    )


def share_axis(values: Sequence[float]) -> Axis:
    """Returns an axis in percent. If the values are shares, it does not reach below 0 or above 1."""
    axis = linear_axis(values)
    if max(values) - min(values) <= 1e-9:
        axis = linear_axis([0.0, *values, 1.0])
    low = axis.low if min(values) < 0 else max(0.0, axis.low)
    high = axis.high if max(values) > 1 else min(1.0, axis.high)
    return Axis(
        low,
        high,
        axis.ticks,
        format_label=percent_tick,
    )


def whole_number_axis(high: float) -> Axis:
    """Returns an axis from 0 to at least `high`, of which only whole numbers are labeled."""
    axis = linear_axis([0, high], 4)
    ticks = [tick for tick in axis.ticks if tick == int(tick)]
    return Axis(
        0,
        max(high, *ticks),
        ticks,
        format_label=format_whole,
    )


def format_whole(value: float) -> str:
    return f"{int(value):,}"


def log_axis(values: Sequence[float]) -> Axis:
    """Returns a logarithmic axis with powers of ten as ticks; over at most two of them also with twos and fives."""
    low = min(values)
    high = max(values)
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high) + 1e-9)
    last = max(last, first + 1)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, (last - first) // 6)
    ticks = [
        factor * 10.0**power
        for power in range(
            first,
            last,
            every,
        )
        for factor in factors
    ]
    ticks.append(10.0**last)
    visible = [tick for tick in ticks if low / 2.5 <= tick <= high * 2.5] or ticks
    return Axis(
        min(low, visible[0]),
        max(high, visible[-1]),
        visible,
        log=True,
    )


def step_axis(steps: Sequence[float]) -> Axis:
    """Returns an axis over the steps, of which only whole numbers are labeled."""
    low = min(steps)
    high = max(steps)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    ticks = [tick for tick in linear_axis([low, high], 6).ticks if tick == int(tick)]
    return Axis(
        low,
        high,
        ticks,
        format_label=format_whole,
    )
