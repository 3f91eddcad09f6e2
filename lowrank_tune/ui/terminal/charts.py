"""Line charts in text, drawn dot by dot: Braille has 2 x 4 dots in a cell, so that 40 cells show 80 columns. ASCII has
one.

Raw values are dim dots; their exponential moving average is the bright line. A second curve (validation) has its own
color or sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowrank_tune.ui.terminal.text_layout import Line

Points = Sequence[tuple[float, float]]
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Braille cell, by row and column
LABEL_WIDTH = 7  # cells left of the axis


@dataclass(frozen=True)
class Curve:
    """A curve to draw. `sign` stands for it in ASCII; `line`: neighbors are joined."""

    points: Points
    style: str = "first"
    sign: str = "*"
    line: bool = True


class Canvas:
    """A grid of dots with one style a cell: what is drawn later wins."""

    def __init__(self, width: int, height: int, ascii_only: bool = False) -> None:
        self.ascii_only = ascii_only
        if ascii_only:
            self.columns, self.rows = (width, height)
        else:
            self.columns, self.rows = (2 * width, 4 * height)
        self._cells = [[0] * width for _ in range(height)]
        self._signs = [[" "] * width for _ in range(height)]
        self._styles = [[""] * width for _ in range(height)]

    def dot(self, x: int, y: int, style: str, sign: str) -> None:
        """Sets a dot; (0, 0) is the upper left one."""
        column, row = (x, y) if self.ascii_only else (x >> 1, y >> 2)
        self._styles[row][column] = style
        self._signs[row][column] = sign
        if not self.ascii_only:
            self._cells[row][column] |= _DOTS[y & 3][x & 1]

    def lines(self) -> list[Line]:
        """The canvas as lines, neighbors of one style joined."""
        drawn: list[Line] = []
        for cells, signs, styles in zip(self._cells, self._signs, self._styles, strict=True):
            if self.ascii_only:
                texts = signs
            else:
                texts = [chr(0x2800 + cell) if cell else " " for cell in cells]
            line: Line = []
            for text, style in zip(texts, styles, strict=True):
                if line and line[-1][1] == style:
                    line[-1] = (line[-1][0] + text, style)
                else:
                    line.append((text, style))
            drawn.append(line)
        return drawn


def smooth(points: Points, weight: float) -> list[tuple[float, float]]:
    """The exponential moving average, corrected for its empty beginning as Adam's is; what is not finite is left
    out."""
    average = 0.0
    total = 0.0
    averaged = []
    for x, y in points:
        if not math.isfinite(y):
            continue
        average = weight * average + (1 - weight) * y
        total = weight * total + (1 - weight)
        averaged.append((x, average / total))
    return averaged


def format_number(value: float) -> str:
    """A number in at most six characters."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 99_999.5 or size < 0.001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.{max(0, min(3, 2 - math.floor(math.log10(size))))}f}"


def axis_ranges(curves: Sequence[Curve], log: bool) -> tuple[float, float, float, float] | None:
    """First and last x, lowest and highest y of what can be drawn; None where nothing can."""
    usable = [(x, y) for curve in curves for x, y in curve.points if math.isfinite(y) and (y > 0 or not log)]
    if not usable:
        return None
    xs = [x for x, _ in usable]
    ys = [y for _, y in usable]
    return min(xs), max(xs), min(ys), max(ys)


def draw(canvas: Canvas, curve: Curve, area: tuple[float, float, float, float], log: bool) -> None:
    """Puts a curve on the canvas: the mean of the points in each column, neighboring columns joined by a line."""
    left, right, low, high = area
    if log:
        low = math.log(low)
        high = math.log(high)
    across = (canvas.columns - 1) / (right - left) if right > left else 0.0
    up = (canvas.rows - 1) / (high - low) if high > low else 0.0
    sums: dict[int, tuple[float, int]] = {}
    for x, y in curve.points:
        if not math.isfinite(y) or (log and y <= 0):
            continue
        column = round((x - left) * across)
        total, count = sums.get(column, (0.0, 0))
        sums[column] = (total + (math.log(y) if log else y), count + 1)
    flat = 0.0 if up else (canvas.rows - 1) / 2  # a constant stands in the middle
    heights = [
        (column, round(canvas.rows - 1 - flat - (total / count - low) * up))
        for column, (total, count) in sorted(sums.items())
    ]
    for index, (column, row) in enumerate(heights):
        canvas.dot(column, row, curve.style, curve.sign)
        if curve.line and index:
            _join(canvas, curve, heights[index - 1], (column, row))


def _join(canvas: Canvas, curve: Curve, start: tuple[int, int], end: tuple[int, int]) -> None:
    """A straight line of dots without gaps between two dots."""
    (x0, y0), (x1, y1) = start, end
    for step in range(1, max(x1 - x0, abs(y1 - y0))):
        share = step / max(x1 - x0, abs(y1 - y0))
        canvas.dot(round(x0 + share * (x1 - x0)), round(y0 + share * (y1 - y0)), curve.style, curve.sign)


def format_integer(value: float) -> str:
    return f"{value:.0f}"


def chart(
    curves: Sequence[Curve],
    width: int,
    height: int,
    log: bool = False,
    ascii_only: bool = False,
    format_x: Callable[[float], str] = format_integer,
) -> list[Line]:
    """`height` lines of `width` cells: the curves, the values of the y axis at its left, the steps below (`across`
    writes them). Log falls back to linear where no value is positive."""
    area = axis_ranges(curves, log) or axis_ranges(curves, False)
    plot_width = width - LABEL_WIDTH - 1
    plot_height = height - 1
    if plot_width < 4 or plot_height < 2:
        return []
    if area is None:
        return [[("  no values yet", "quiet")]]
    log = log and area[2] > 0
    canvas = Canvas(plot_width, plot_height, ascii_only)
    for curve in curves:
        draw(canvas, curve, area, log)
    left, right, low, high = area
    middle = math.sqrt(low * high) if log else (low + high) / 2
    labels = {0: high, plot_height - 1: low} if high > low else {}
    if plot_height >= 5 or high == low:
        labels[(plot_height - 1) // 2] = middle
    edge = "|" if ascii_only else "\u2502"
    lines: list[Line] = []
    for row, line in enumerate(canvas.lines()):
        label = format_number(labels[row]) if row in labels else ""
        lines.append([(f"{label:>{LABEL_WIDTH - 1}} {edge}", "quiet"), *line])
    return [*lines, _steps_axis(format_x(left), format_x(right), plot_width)]


def _steps_axis(first: str, last: str, width: int) -> Line:
    between = width - len(first) - len(last)
    if between > 0 and first != last:
        text = f"{first}{' ' * between}{last}"
    else:
        text = last.rjust(width)
    return [(" " * (LABEL_WIDTH + 1) + text, "quiet")]
