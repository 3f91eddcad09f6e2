"""Line charts and bars as inline SVG, written by hand: crisp at any size, colored by the page's own style."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.metrics import pair_side

WIDTH = 560
HEIGHT = 230
LEFT = 56
RIGHT = 12
TOP = 10
BOTTOM = 26
BUCKETS = 300  # of a long series: the lowest and the highest point of each stay

Point = tuple[float, float]


@dataclass(frozen=True)
class ChartLine:
    """One line of a chart. `kind` is its class in the style sheet: raw, smooth, check, chosen or rejected."""

    name: str
    kind: str
    points: Sequence[Point]


def downsample(points: Sequence[Point], buckets: int = BUCKETS) -> list[Point]:
    """At most two points a bucket, its lowest and its highest, so that no spike is lost; and both ends."""
    if len(points) <= 2 * buckets:
        return list(points)
    indices = {0, len(points) - 1}
    for bucket in range(buckets):
        part = range(bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets)
        indices |= {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(indices)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """An exponential mean over about a twentieth of the points, without a pull towards 0 at its beginning."""
    keep = 1 - 2 / (max(4, len(points) / 20) + 1)
    total = weight = 0.0
    out = []
    for step, value in points:
        total = keep * total + value
        weight = keep * weight + 1
        out.append((step, total / weight))
    return out


def chart(lines: Sequence[ChartLine], log: bool = False) -> str:
    """The SVG of a chart. Values that are not finite, and on a logarithmic scale those that are not positive, leave a
    gap."""
    points = [point for line in lines for point in line.points if _fits(point[1], log)]
    if not points:
        return ""
    low_x, high_x = _axis_range([x for x, _ in points])
    ticks, low_y, high_y = (_log_ticks if log else ticks_of)([y for _, y in points])

    def x_to_pixel(x: float) -> float:
        return LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def y_to_pixel(y: float) -> float:
        if log:
            share = math.log10(y / low_y) / math.log10(high_y / low_y)
        else:
            share = (y - low_y) / (high_y - low_y)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="chart {"log" if log else "lin"}" role="img" data-x="{low_x:g} '
        f'{high_x:g}"'
        f' data-box="{LEFT} {TOP} {WIDTH - RIGHT} {HEIGHT - BOTTOM}">'
    ]
    for tick in ticks:
        y = y_to_pixel(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{format_tick(tick)}</text>'
        )
    for tick in ticks_of([low_x, high_x], 6)[0]:
        if low_x <= tick <= high_x and tick == int(tick):
            x = x_to_pixel(tick)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{int(tick):,}</text>')
    for line in lines:
        path = []
        dots = []
        pen = "M"
        for x, y in line.points:
            if not _fits(y, log):
                pen = "M"
                continue
            path.append(f"{pen}{x_to_pixel(x):.1f} {y_to_pixel(y):.1f}")
            pen = "L"
            if line.kind == "check":
                dots.append(
                    f'<circle class="check" cx="{x_to_pixel(x):.1f}" cy="{y_to_pixel(y):.1f}" r="2.6">'
                    f"<title>{escape(line.name)} {format_tick(y)} after step {x:g}</title></circle>"
                )
        parts.append(
            f'<path class="{line.kind}" d="{"".join(path)}"><title>{escape(line.name)}</title></path>{"".join(dots)}'
        )
    return "".join(parts) + '<line class="cross" y1="10" y2="204" visibility="hidden"/></svg>'


def hover_data(lines: Sequence[ChartLine]) -> str:
    """What a chart's tooltip needs, as JSON for an attribute: for each line its name and its points."""
    data = [[line.name, [[x, float(f"{y:.4g}")] for x, y in line.points if math.isfinite(y)]] for line in lines]
    return escape(json.dumps(data, separators=(",", ":")), quote=True)


def bar(share: float, kind: str = "") -> str:
    """A horizontal bar of this share of its place."""
    width = 100 * max(0.0, min(1.0, share))
    return (
        f'<svg class="bar {kind}" viewBox="0 0 100 8" preserveAspectRatio="none" role="img"><rect class="track" '
        f'width="100" height="8"/>'
        f'<rect class="fill" width="{width:.2f}" height="8"/></svg>'
    )


def histogram(edges: Sequence[int], counts: Sequence[int], limit: int, over: int) -> str:
    """Upright bars of lengths, and one for what is over the limit."""
    values = [*counts, over]
    names = [f"{low + 1:,} to {high:,} tokens" for low, high in zip(edges, edges[1:], strict=False)] + [
        f"over {limit:,} tokens"
    ]
    largest = max([*values, 1])
    step = (WIDTH - LEFT - RIGHT) / max(1, len(values))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="chart" role="img">']
    ticks = [tick for tick in ticks_of([0, largest], 4)[0] if tick == int(tick)]
    high = max(largest, *ticks)
    for tick in ticks:
        y = HEIGHT - BOTTOM - tick / high * (HEIGHT - TOP - BOTTOM)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{int(tick):,}</text>'
        )
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        tall = value / high * (HEIGHT - TOP - BOTTOM)
        x = LEFT + index * step
        last = index == len(values) - 1
        parts.append(
            f'<rect class="{"over" if last else "fill"}" x="{x + step * 0.08:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" '
            f'rx="1.5"'
            f' width="{step * 0.84:.1f}" height="{tall:.1f}"><title>{name}: {value:,} rows</title></rect>'
            f'<text class="tick" x="{x + step / 2:.1f}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{f'&gt; {limit:,}' if last else f'{edges[index + 1]:,}'}</text>"
        )
    return "".join(parts) + "</svg>"


def format_tick(value: float) -> str:
    """A number for a tick: four figures at most."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        if abs(value) < 1000:
            return f"{value:,.4g}"
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def lines_of(name: str, points: Mapping[int, float], checks: Mapping[int, float], check_name: str) -> list[ChartLine]:
    """The lines of one statistic: every step faintly, a smooth one over it, and the validation's."""
    # they may come from anyone's events
    name = escape_control_chars(name, 60)
    check_name = escape_control_chars(check_name, 60)
    every = [(float(step), value) for step, value in sorted(points.items())]
    chart_lines = []
    if every:
        finite = [point for point in every if math.isfinite(point[1])]
        is_rough = _is_rough([value for _, value in finite])
        chart_lines.append(ChartLine(name, "raw" if is_rough else "smooth", downsample(every)))
        if is_rough:
            chart_lines.append(ChartLine("smoothed", "smooth", downsample(smooth(finite), 100)))
    if checks:
        chart_lines.append(
            ChartLine(
                check_name,
                "check",
                downsample([(float(step), value) for step, value in sorted(checks.items())], 100),
            )
        )
    return chart_lines


def pair_lines(series: Mapping[str, Mapping[int, float]]) -> list[ChartLine]:
    """The lines of both sides of a pair: their smooth course alone, since two rough ones could not be told apart."""
    lines = []
    for name, points in series.items():
        finite = [(float(step), value) for step, value in sorted(points.items()) if math.isfinite(value)]
        if finite:
            lines.append(
                ChartLine(
                    pair_side(name),
                    pair_side(name),
                    downsample(smooth(finite) if _is_rough([value for _, value in finite]) else finite),
                )
            )
    return lines


def _is_rough(values: Sequence[float]) -> bool:
    """Whether the line goes up and down so often that a smooth one helps the eye; a learning rate's does not."""
    moves = [b - a for a, b in zip(values, values[1:], strict=False) if b != a]
    turns = sum(a * b < 0 for a, b in zip(moves, moves[1:], strict=False))
    return len(values) > 12 and turns > len(values) / 5


def _fits(value: float, log: bool) -> bool:
    return math.isfinite(value) and (not log or value > 1e-300)


def _axis_range(values: Sequence[float]) -> tuple[float, float]:
    low = min(values)
    high = max(values)
    if high > low:
        return (low, high)
    return (low - 0.5, high + 0.5)


def ticks_of(values: Sequence[float], count: int = 5) -> tuple[list[float], float, float]:
    """About `count` round numbers around the values, and the range that they span."""
    low = min(values)
    high = max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        if low:
            low, high = (low - abs(low) / 2, high + abs(high) / 2)
        else:
            low, high = (-1.0, 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * count >= high - low)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    ticks = [round(index * step, 12) if step > 1e-9 else index * step for index in range(first, last + 1)]
    return ticks, ticks[0], ticks[-1]


def _log_ticks(values: Sequence[float]) -> tuple[list[float], float, float]:
    """Powers of ten; where the values span less than two of them, 2 and 5 between."""
    low = min(values)
    high = max(values)
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high) + 1e-9)
    last = max(last, first + 1)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, (last - first) // 6)
    ticks = [factor * 10.0**power for power in range(first, last, every) for factor in factors] + [10.0**last]
    visible = [tick for tick in ticks if low / 2.5 <= tick <= high * 2.5] or ticks
    return visible, min(low, visible[0]), max(high, visible[-1])
