"""Pictures of scores as inline SVG: how far confidence can be believed, how the sides are spread, and whether length
decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lowrank_tune.ui.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Point, format_tick, ticks_of

BINS = 28
MAX_DOTS = 800
LENGTH_BINS = 10


@dataclass(frozen=True)
class Axes:
    """Where numbers lie in a picture."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def across(self, x: float) -> float:
        return LEFT + (x - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)

    def at(self, point: Point) -> str:
        return f"{self.across(point[0]):.1f} {self.down(point[1]):.1f}"

    def frame(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        """The grid with its numbers; ticks outside of the plane are left out."""
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="chart" role="img">']
        for y in (y for y in ys if self.low_y <= y <= self.high_y):
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.down(y):.1f}" y2="{self.down(y):.1f}"/>'
                f'<text class="tick" x="{LEFT - 7}" y="{self.down(y) + 3.5:.1f}" '
                f'text-anchor="end">{format_tick(y)}</text>'
            )
        for x in (x for x in xs if self.low_x <= x <= self.high_x):
            parts.append(
                f'<text class="tick" x="{self.across(x):.1f}" y="{HEIGHT - 8}" '
                f'text-anchor="middle">{format_tick(x)}</text>'
            )
        return "".join(parts)


def reliability(bins: Sequence[tuple[float, float, int]]) -> str:
    """Share that is right (y) by confidence (x), a dot as large as its pairs are many; on the dashed line confidence is
    what it says. No line joins the dots: one of few pairs says little, and must not look like a trend."""
    if not bins:
        return ""
    axes = Axes(0.48, 1.02, -0.06, 1.08)
    largest = max(count for _, _, count in bins)
    parts = [
        axes.frame((0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (0, 0.25, 0.5, 0.75, 1.0)),
        f'<path class="ideal" d="M{axes.at((0.5, 0.5))}L{axes.at((1.0, 1.0))}"><title>perfectly '
        f"calibrated</title></path>",
    ]
    for confidence, right, count in bins:
        x = axes.across(confidence)
        y = axes.down(right)
        size = 2.5 + 8 * (count / largest) ** 0.5
        label = y + size + 12 if y - size < TOP + 14 else y - size - 4
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}">'
            f"<title>{count:,} pairs: confidence {confidence:.3f}, right {right:.3f}</title></circle>"
            f'<text class="tick" x="{x:.1f}" y="{label:.1f}" text-anchor="middle">{count:,}</text>'
        )
    return "".join(parts) + "</svg>"


def histogram_pair(sides: Mapping[str, Sequence[float]]) -> str:
    """The histograms of both sides over each other."""
    every = [value for values in sides.values() for value in values]
    if not every:
        return ""
    xs, low, high = ticks_of(every, 7)
    width = (high - low) / BINS
    counts = {side: [0] * BINS for side in sides}
    for side, values in sides.items():
        for value in values:
            counts[side][min(BINS - 1, int((value - low) / width))] += 1
    ys, _, top = ticks_of([0, max(max(values) for values in counts.values())], 4)
    axes = Axes(low, high, 0.0, top)
    parts = [axes.frame(xs, [y for y in ys if y == int(y)])]
    step = (WIDTH - LEFT - RIGHT) / BINS
    for side, values in counts.items():
        for index, count in enumerate(values):
            if count:
                y = axes.down(count)
                first = low + index * width
                title = f"{count:,} {side}: {format_tick(first)} to {format_tick(first + width)}"
                parts.append(
                    f'<rect class="{side}" x="{LEFT + index * step:.1f}" y="{y:.1f}" width="{step - 1:.1f}" rx="1.5" '
                    f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{title}</title></rect>'
                )
    return "".join(parts) + "</svg>"


def scatter(sides: Mapping[str, Sequence[Point]]) -> str:
    """Each answer by its tokens (x) and its score (y), both sides in their colors; the line joins the means of
    neighboring lengths."""
    every = sorted(point for points in sides.values() for point in points)
    if not every:
        return ""
    xs, low_x, high_x = ticks_of([x for x, _ in every], 7)
    ys, low_y, high_y = ticks_of([y for _, y in every])
    axes = Axes(low_x, high_x, low_y, high_y)
    parts = [axes.frame(xs, ys)]
    for side, points in sides.items():
        dots = "".join(f"M{axes.at(point)}h0" for point in points[:: max(1, -(-len(points) // MAX_DOTS))])
        parts.append(f'<path class="dots {side}" d="{dots}"><title>{side}</title></path>')
    means = _means(every)
    if len(means) > 1:
        parts.append(f'<path class="smooth" d="M{"L".join(map(axes.at, means))}"><title>mean by length</title></path>')
    return "".join(parts) + "</svg>"


def _means(points: Sequence[Point]) -> list[Point]:
    """The mean tokens and score of about `LENGTH_BINS` stretches of equally many answers; equal lengths are never
    parted."""
    bin_size = max(1, len(points) // LENGTH_BINS)
    means = list[Point]()
    part = list[Point]()
    for index, point in enumerate(points):
        part.append(point)
        is_edge = index + 1 == len(points) or points[index + 1][0] != point[0]
        if is_edge and (len(part) >= bin_size or index + 1 == len(points)):
            means.append((fmean(x for x, _ in part), fmean(y for _, y in part)))
            part = []
    return means
