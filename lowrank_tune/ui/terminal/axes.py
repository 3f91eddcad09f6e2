"""The y axis of a chart: a range with round ends, and ticks at multiples of 1, 2 or 5 times a power of ten."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MIN_INTERVALS = 2
"""Intervals between labeled ticks, so that an axis has at least three of them."""
MIN_TICK_ROWS = 2.0
MIN_LOG_TICK_ROWS = 1.4
"""Lines between two labeled ticks, those of a logarithmic axis on average."""
INTERVALS = {2: 1, 3: 1, 4: 2, 6: 2}
"""Numbers of steps that may cover the range, each with the steps from one label to the next."""
MAX_STEPS = max(INTERVALS)
STEPS = (1.0, 2.0, 5.0)
NEAR_ZERO = 0.01
"""Share of the range below which an end of it is 0."""
TOLERANCE = 0.03
"""Share of an interval by which a value may be beyond an end: less than a dot."""
ROUNDING = 1e-9
"""Share of a value by which equal values differ at most."""
MIN_SPAN = 1e-3
"""Share of a value that the range of nearly constant values has at least."""
MIN_SPAN_WITH_EXPONENT = 0.5
"""The same where labels need an exponent and have room for two digits."""
MIN_PLAIN_SPAN = 5e-4
"""Range that labels without an exponent can divide."""
MIN_PLAIN, MAX_PLAIN = 1e-3, 9e4
"""Values between these have labels without an exponent."""
SHARE_SPAN = 0.1
"""Range of a constant share."""
SHARE_ROUNDING = 1e-6
"""How far a mean in single precision may be below 0 or above 1."""
MAX_DECIMALS = 4
MAX_LABEL = 7
"""Characters of a label."""


@dataclass(frozen=True)
class Axis:
    """Range and labeled ticks, the lowest first. `share` writes them in percent."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False
    share: bool = False

    def position(self, value: float) -> float:
        """Returns where a value is between the ends, 0 for the lower and 1 for the upper one."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)

    def labels(self) -> list[str]:
        """Returns the text of each tick."""
        factor = 100.0 if self.share else 1.0
        unit = " %" if self.share else ""
        texts = _format_ticks([factor * tick for tick in self.ticks], self.log)
        return [f"{text}{unit}" for text in texts]


def make_axis(
    low: float,
    high: float,
    rows: int,
    log: bool = False,
    share: bool = False,
) -> Axis:
    """Returns the axis for values from `low` to `high` in a chart of `rows` lines. That of a share stays between 0 and
    1, unless the values do not."""
    tick_rows = MIN_LOG_TICK_ROWS if log else MIN_TICK_ROWS
    most = max(MIN_INTERVALS, int((rows - 1) / tick_rows))
    if log:
        return _log_axis(
            low,
            high,
            most,
            share,
        )
    is_within = share and low >= -SHARE_ROUNDING and high <= 1 + SHARE_ROUNDING
    limit = 1.0 if is_within else math.inf
    ticks = _linear_ticks(*_linear_range(low, high, is_within), most, limit)
    return Axis(ticks[0], ticks[-1], ticks, False, share)


def _linear_range(
    low: float,
    high: float,
    share: bool,
) -> tuple[float, float]:
    """Returns a range that is not empty; an end that is nearly 0 becomes 0."""
    size = max(abs(low), abs(high))
    if size == 0:
        return 0.0, SHARE_SPAN if share else 1.0
    least = _min_span(size)
    if high - low < least:
        middle = (low + high) / 2
        is_constant = high - low <= ROUNDING * size
        span = max(least, SHARE_SPAN if share else 0.2 * size) if is_constant else least
        low, high = middle - span / 2, middle + span / 2
    if share:
        low, high = max(0.0, low), min(1.0, high)
    near_zero = NEAR_ZERO * (high - low)
    return 0.0 if abs(low) < near_zero else low, 0.0 if abs(high) < near_zero else high


def _min_span(size: float) -> float:
    """Returns the range that the labels of values of this size can divide."""
    if size > MAX_PLAIN:
        return MIN_SPAN_WITH_EXPONENT * size
    return max(MIN_SPAN * size, min(MIN_SPAN_WITH_EXPONENT * size, MIN_PLAIN_SPAN))


def _linear_ticks(
    low: float,
    high: float,
    most: int,
    limit: float = math.inf,
) -> list[float]:
    """Returns ticks at equal distances up to `limit`, of which the first and the last enclose the range as closely as
    possible."""
    best = list[float]()
    for step in _round_steps((high - low) / MAX_STEPS):
        ticks = _ticks_of_step(
            low,
            high,
            step,
            most,
        )
        is_valid = bool(ticks) and ticks[-1] <= limit
        if is_valid and (not best or ticks[-1] - ticks[0] < best[-1] - best[0]):
            best = ticks
        if step > high - low:
            return best or [0.0, limit / 2, limit]
    raise AssertionError("steps have no end")


def _ticks_of_step(
    low: float,
    high: float,
    step: float,
    most: int,
) -> list[float]:
    """Returns the labeled multiples of a step, none if they were too many."""
    last = math.ceil(high / step - TOLERANCE)
    for count, stride in INTERVALS.items():
        # labels are multiples of their distance, so that 0 is one of them
        first = math.floor(low / step + TOLERANCE) // stride * stride
        if count >= last - first and count // stride <= most:
            if high <= 0:
                # a negative range is extended at its lower end
                first = -(-last // stride) * stride - count
            return [_rounded((first + index) * step) for index in range(0, count + 1, stride)]
    return []


def _round_steps(least: float) -> Iterator[float]:
    """Yields 1, 2 and 5 times powers of ten without an end, beginning below `least`."""
    power = math.floor(math.log10(least))
    while True:
        for factor in STEPS:
            yield factor * 10.0**power
        power += 1


def _log_axis(
    low: float,
    high: float,
    most: int,
    share: bool,
) -> Axis:
    """Returns an axis whose ends are 1, 2 or 5 times a power of ten, with those as ticks or, if they are too many,
    powers of ten. Within less than three of them the ticks are those of a linear axis, above 0."""
    powers = range(_floor_power(low), _ceil_power(high) + 1)
    numbers = [_rounded(factor * 10.0**power) for power in powers for factor in STEPS]
    first = max(index for index, number in enumerate(numbers) if number <= low * (1 + 1e-9))
    last = min(index for index, number in enumerate(numbers) if number >= high * (1 - 1e-9))
    ticks = numbers[first : last + 1]
    bottom, top = ticks[0], ticks[-1]
    if len(ticks) <= MIN_INTERVALS:
        # the wide range of a constant share would contain 0
        bottom, top = _linear_range(low, high, False)
        if share and high <= 1 + SHARE_ROUNDING:
            top = min(1.0, top)
        ticks = _linear_ticks(bottom, top, most)
        while ticks[0] <= 0:
            # a logarithm has no 0
            most += 1
            ticks = _linear_ticks(bottom, top, most)
        bottom, top = ticks[0], ticks[-1]
    elif len(ticks) > most + 1:
        decades = [10.0**power for power in powers if bottom <= 10.0**power <= top]
        ticks = _thinned(decades if len(decades) > MIN_INTERVALS else ticks, most)
    return Axis(bottom, top, ticks, True, share)


def _floor_power(value: float) -> int:
    return math.floor(math.log10(value) + 1e-9)


def _ceil_power(value: float) -> int:
    return math.ceil(math.log10(value) - 1e-9)


def _thinned(ticks: Sequence[float], most: int) -> list[float]:
    """Returns every n-th tick, so that there are about `most` intervals, and at least three ticks."""
    intervals = len(ticks) - 1
    every = min(math.ceil(intervals / most), intervals // MIN_INTERVALS)
    return list(ticks[::every])


def _rounded(value: float) -> float:
    """Removes the rounding error of a multiple of a step."""
    return float(f"{value:.12g}")


def _format_ticks(ticks: Sequence[float], log: bool) -> list[str]:
    """Returns texts with the decimals that distinguish the ticks, as powers of ten where those would be too long."""
    if log:
        return [_shortest(tick) for tick in ticks]
    decimals = max(_decimals(tick) for tick in ticks)
    plain = ["0" if tick == 0 else f"{tick:.{decimals}f}" for tick in ticks]
    if decimals <= MAX_DECIMALS and all(len(text) <= MAX_LABEL for text in plain):
        return plain
    return [_with_exponent(tick) for tick in ticks]


def _decimals(value: float) -> int:
    """Returns the digits after the point that a round value has."""
    return len(f"{value:.9f}".rstrip("0").partition(".")[2])


def _shortest(value: float) -> str:
    return f"{value:g}" if MIN_PLAIN <= value <= MAX_PLAIN else _with_exponent(value)


def _with_exponent(value: float) -> str:
    """Returns `1.5e-4`."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"
