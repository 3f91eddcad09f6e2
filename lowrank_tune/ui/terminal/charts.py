"""Line charts in text. A Braille cell has 2 x 4 dots, so 40 cells show 80 columns of dots; an ASCII cell has one.

Measured values are dim dots, their exponential moving average is a bright line, validation has its own color or sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lowrank_tune.ui.metrics import Point, Points
from lowrank_tune.ui.terminal.axes import Axis, make_axis
from lowrank_tune.ui.terminal.text_layout import Block, Line

Dot = tuple[int, int]
"""Column and row, counted from the upper left corner."""

_DOT_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a Braille cell, by row and column."""
_EMPTY_BRAILLE_CELL = 0x2800
LABEL_WIDTH = 8
"""Cells at the left of the y axis."""
MIN_CHART_WIDTH = 36
MIN_CHART_HEIGHT = 9
MAX_COLUMNS = 3
MIN_PLOT_WIDTH = 4
MIN_PLOT_HEIGHT = 2


@dataclass(frozen=True)
class Curve:
    """A curve to draw. `sign` draws it in ASCII; with `line`, neighboring points are joined; `end` is a character at
    its last point."""

    points: Points
    style: str = "first"
    sign: str = "*"
    line: bool = True
    end: str = ""


@dataclass(frozen=True)
class Area:
    """The ranges of both axes, in the units of the points."""

    left: float
    right: float
    low: float
    high: float
    log: bool = False
    """Whether the y axis is logarithmic."""


class Canvas:
    """A grid of dots with one style for each cell, that of its last dot."""

    def __init__(
        self,
        width: int,
        height: int,
        ascii_only: bool = False,
    ) -> None:
        self.ascii_only = ascii_only
        self.width = width
        self.height = height
        self.columns = width
        self.rows = height
        if not ascii_only:
            self.columns = 2 * width
            self.rows = 4 * height
        self._bits = [[0] * width for _ in range(height)]
        self._signs = [[" "] * width for _ in range(height)]
        self._styles = [[""] * width for _ in range(height)]

    def dot(
        self,
        x: int,
        y: int,
        style: str,
        sign: str,
    ) -> None:
        """Sets a dot; (0, 0) is the upper left one."""
        column, row = x, y
        if not self.ascii_only:
            column = x // 2
            row = y // 4
            self._bits[row][column] |= _DOT_BITS[y % 4][x % 2]
            sign = chr(_EMPTY_BRAILLE_CELL + self._bits[row][column])
        self._styles[row][column] = style
        self._signs[row][column] = sign

    def mark(
        self,
        column: int,
        row: int,
        sign: str,
        style: str,
    ) -> None:
        """Replaces a cell by a sign."""
        self._signs[row][column] = sign
        self._styles[row][column] = style

    def lines(self) -> Block:
        """Returns the canvas as lines in which neighbors of the same style are joined."""
        return [_joined(signs, styles) for signs, styles in zip(self._signs, self._styles, strict=True)]


def _joined(signs: Sequence[str], styles: Sequence[str]) -> Line:
    line: Line = []
    for sign, style in zip(signs, styles, strict=True):
        if line and line[-1][1] == style:
            line[-1] = (line[-1][0] + sign, style)
        else:
            line.append((sign, style))
    return line


def smooth(points: Points, weight: float) -> list[Point]:
    """Returns the exponential moving average, with the bias correction of Adam for the first points. Points that are
    not finite are left out."""
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
    """Returns a number in at most six characters."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 99_999.5 or size < 0.001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    decimals = 2 - math.floor(math.log10(size))
    return f"{value:.{max(0, min(3, decimals))}f}"


def axis_ranges(curves: Sequence[Curve], log: bool) -> Area | None:
    """Returns the ranges of all points that can be drawn, None if there are none."""
    xs = list[float]()
    ys = list[float]()
    for curve in curves:
        for x, y in curve.points:
            if _is_drawable(y, log):
                xs.append(x)
                ys.append(y)
    if not xs:
        return None
    return Area(min(xs), max(xs), min(ys), max(ys), log)


def _is_drawable(y: float, log: bool) -> bool:
    return math.isfinite(y) and (y > 0 or not log)


def draw(
    canvas: Canvas,
    curve: Curve,
    area: Area,
) -> None:
    """Draws a curve: a dot in each column that has points, and a line between neighboring dots."""
    previous: Dot | None = None
    for dot in _dots(canvas, curve.points, area):
        canvas.dot(*dot, curve.style, curve.sign)
        if curve.line and previous is not None:
            _draw_line(canvas, curve, previous, dot)
        previous = dot
    if curve.end and previous is not None:
        x, y = previous
        canvas.mark(
            x * canvas.width // canvas.columns,
            y * canvas.height // canvas.rows,
            curve.end,
            curve.style,
        )


def _dots(
    canvas: Canvas,
    points: Points,
    area: Area,
) -> list[Dot]:
    """Returns a dot for each column that has points, at the height of their mean."""
    low, high = area.low, area.high
    if area.log:
        low = math.log(low)
        high = math.log(high)
    across = (canvas.columns - 1) / (area.right - area.left) if area.right > area.left else 0.0
    columns: dict[int, list[float]] = {}
    for x, y in points:
        if _is_drawable(y, area.log):
            column = round((x - area.left) * across)
            columns.setdefault(column, []).append(math.log(y) if area.log else y)
    bottom = canvas.rows - 1
    dots = []
    for column, values in sorted(columns.items()):
        # a constant is in the middle
        height = bottom / 2
        if high > low:
            mean = sum(values) / len(values)
            height = (mean - low) * (bottom / (high - low))
        dots.append((column, min(bottom, max(0, round(bottom - height)))))
    return dots


def _draw_line(
    canvas: Canvas,
    curve: Curve,
    start: Dot,
    end: Dot,
) -> None:
    """Draws a straight line of dots without gaps between two dots."""
    across = end[0] - start[0]
    down = end[1] - start[1]
    steps = max(across, abs(down))
    for step in range(1, steps):
        share = step / steps
        x = round(start[0] + share * across)
        y = round(start[1] + share * down)
        canvas.dot(x, y, curve.style, curve.sign)


def grid_size(
    count: int,
    width: int,
    height: int,
) -> tuple[int, int]:
    """Returns the columns and rows of `count` charts that a screen has room for, at least one each."""
    columns = max(1, min(MAX_COLUMNS, width // MIN_CHART_WIDTH, count))
    rows_needed = -(-count // columns)
    return columns, max(1, min(height // MIN_CHART_HEIGHT, rows_needed))


def format_integer(value: float) -> str:
    return f"{value:.0f}"


def chart(
    curves: Sequence[Curve],
    width: int,
    height: int,
    log: bool = False,
    ascii_only: bool = False,
    format_x: Callable[[float], str] = format_integer,
    share: bool = False,
    outliers: Points = (),
) -> Block:
    """Returns `height` lines of `width` cells: the curves, at their left ticks of the y axis, and below them the ends
    of the x axis, written by `format_x`.

    `log` has no effect if no value is positive. `share` labels the y axis in percent. `outliers` are marked at the
    upper or lower edge, and the farthest is named below the curves; those within the range of the curves are dots.
    """
    area = axis_ranges(curves, log) or axis_ranges(curves, False)
    plot_width = width - LABEL_WIDTH - 1
    plot_height = height - 1
    if plot_width < MIN_PLOT_WIDTH or plot_height < MIN_PLOT_HEIGHT:
        return []
    if area is None:
        return [[("  no values yet", "quiet")]]
    axis = make_axis(
        area.low,
        area.high,
        plot_height,
        area.log,
        share,
    )
    area = replace(area, low=axis.low, high=axis.high)
    beyond = [point for point in outliers if not area.low <= point[1] <= area.high]
    canvas = Canvas(plot_width, plot_height, ascii_only)
    for curve in [_inside(outliers, area), *curves]:
        draw(canvas, curve, area)
    _mark_outliers(canvas, beyond, area)
    labels = _y_labels(axis, canvas)
    edge = "|" if ascii_only else "\u2502"
    lines: Block = []
    for row, line in enumerate(canvas.lines()):
        label = labels.get(row, "")
        lines.append([(f"{label:>{LABEL_WIDTH - 1}} {edge}", "quiet"), *line])
    note = _outlier_note(
        beyond,
        area,
        share,
        ascii_only,
    )
    lines.append(
        _x_axis(
            format_x(area.left),
            format_x(area.right),
            plot_width,
            note,
        )
    )
    return lines


def _y_labels(axis: Axis, canvas: Canvas) -> dict[int, str]:
    """Returns the ticks of the y axis by line. Those at the ends replace another one in the same line."""
    ticks = list(zip(axis.ticks, axis.labels(), strict=True))
    labels = dict[int, str]()
    for tick, label in [*ticks[1:-1], ticks[0], ticks[-1]]:
        # the line that contains the dot of this value
        row = round((canvas.rows - 1) * (1 - axis.position(tick)))
        labels[row * canvas.height // canvas.rows] = label
    return labels


def _inside(outliers: Points, area: Area) -> Curve:
    """Returns dots for the outliers that another curve, such as that of the validation, leaves room for."""
    points = [(min(max(x, area.left), area.right), y) for x, y in outliers if area.low <= y <= area.high]
    return Curve(points, "quiet", ".", line=False)


def _mark_outliers(
    canvas: Canvas,
    outliers: Points,
    area: Area,
) -> None:
    """Marks each outlier at the edge beyond which it is."""
    across = (canvas.width - 1) / (area.right - area.left) if area.right > area.left else 0.0
    for x, y in outliers:
        row = 0 if y > area.high else canvas.height - 1
        column = round((min(max(x, area.left), area.right) - area.left) * across)
        canvas.mark(
            column,
            row,
            _outlier_sign(y, area, canvas.ascii_only),
            "warning",
        )


def _outlier_sign(
    value: float,
    area: Area,
    ascii_only: bool,
) -> str:
    if value > area.high:
        return "^" if ascii_only else "\u25b2"
    return "v" if ascii_only else "\u25bc"


def _outlier_note(
    outliers: Points,
    area: Area,
    share: bool,
    ascii_only: bool,
) -> str:
    """Returns sign, value and step of the farthest outlier, an empty string without one."""
    if not outliers:
        return ""
    middle = (area.low + area.high) / 2
    x, y = max(outliers, key=_distance_from(middle))
    value = f"{100 * y:.1f} %" if share else format_number(y)
    return f"{_outlier_sign(y, area, ascii_only)} {value} at {x:.0f}"


def _distance_from(middle: float) -> Callable[[Point], float]:
    """Returns the distance of a point's value from `middle`, as a sort key."""

    def distance(point: Point) -> float:
        return abs(point[1] - middle)

    return distance


def _x_axis(
    first: str,
    last: str,
    width: int,
    note: str = "",
) -> Line:
    """Returns the ends of the x axis, and between them a note if there is room."""
    text = last.rjust(width)
    between = width - len(first) - len(last)
    if between > 0 and first != last:
        middle = note.center(between) if len(note) + 2 <= between else " " * between
        text = f"{first}{middle}{last}"
    return [(" " * (LABEL_WIDTH + 1) + text, "quiet")]
