"""Plots of the scores of pairs: calibration, the distribution of both sides, and score by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from markupsafe import Markup

from lowrank_tune.ui.formatting import format_tick, percent, percent_tick
from lowrank_tune.ui.metrics import Point
from lowrank_tune.ui.svg import LEFT, PLOT_WIDTH, TOP, Plot
from lowrank_tune.ui.svg_axes import Axis, linear_axis, whole_number_axis

BINS = 28
MAX_DOTS = 800
"""Dots of each side."""
LENGTH_BINS = 10
X_TICKS = 7
CONFIDENCE_AXIS = Axis(
    0.48,
    1.02,
    (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    format_label=percent_tick,
)
RIGHT_AXIS = Axis(
    -0.06,
    1.08,
    (0, 0.25, 0.5, 0.75, 1.0),
    format_label=percent_tick,
)
MIN_RADIUS = 2.5
MAX_RADIUS = 10.5


def reliability(bins: Sequence[tuple[float, float, int]]) -> Markup:
    """Returns the share of right pairs (y) by confidence (x), from bins of (confidence, share, pairs).

    The area of a dot grows with its number of pairs. On the dashed line the confidence is correct. No line joins the
    dots, because a bin of few pairs must not look like a trend.
    """
    if not bins:
        return Markup()
    plot = Plot(CONFIDENCE_AXIS, RIGHT_AXIS, x_title="confidence")
    plot.polyline("ideal", ((0.5, 0.5), (1.0, 1.0)), "perfectly calibrated")
    largest = max(count for _, _, count in bins)
    for confidence, right, count in bins:
        radius = MIN_RADIUS + (MAX_RADIUS - MIN_RADIUS) * (count / largest) ** 0.5
        title = f"{count:,} pairs: confidence {percent(confidence)}, right {percent(right)}"
        plot.circle(
            "dot",
            (confidence, right),
            title,
            radius,
        )
        y = plot.y_at(right)
        # above the dot, or below it at the upper edge
        label_y = y + radius + 12 if y - radius < TOP + 14 else y - radius - 4
        plot.label(f"{count:,}", plot.x_at(confidence), label_y)
    return plot.svg()


def histogram_pair(sides: Mapping[str, Sequence[float]]) -> Markup:
    """Returns the histograms of the scores of both sides, one above the other."""
    scores = [score for values in sides.values() for score in values]
    if not scores:
        return Markup()
    x = linear_axis(scores, X_TICKS)
    bin_width = (x.high - x.low) / BINS
    counts = {side: [0] * BINS for side in sides}
    for side, values in sides.items():
        for score in values:
            counts[side][min(BINS - 1, int((score - x.low) / bin_width))] += 1
    plot = Plot(
        x,
        whole_number_axis(max(max(side_counts) for side_counts in counts.values())),
        x_title="score",
    )
    step = PLOT_WIDTH / BINS
    for side, side_counts in counts.items():
        for index, count in enumerate(side_counts):
            if count:
                start = x.low + index * bin_width
                title = f"{count:,} {side}: {format_tick(start)} to {format_tick(start + bin_width)}"
                plot.bar(
                    side,
                    count,
                    title,
                    LEFT + index * step,
                    step - 1,
                )
    return plot.svg()


def scatter(sides: Mapping[str, Sequence[Point]]) -> Markup:
    """Returns each answer by its tokens (x) and its score (y); the line joins the means of neighboring lengths."""
    points = sorted(point for side_points in sides.values() for point in side_points)
    if not points:
        return Markup()
    x = linear_axis([tokens for tokens, _ in points], X_TICKS)
    plot = Plot(x, linear_axis([score for _, score in points]), x_title="tokens of an answer")
    for side, side_points in sides.items():
        every = max(1, -(-len(side_points) // MAX_DOTS))
        plot.dots(side, side_points[::every], side)
    means = _means(points)
    if len(means) > 1:
        plot.polyline("smooth", means, "mean by length")
    return plot.svg()


def _means(points: Sequence[Point]) -> list[Point]:
    """Returns the mean tokens and the mean score of about `LENGTH_BINS` bins of equally many answers.

    The points must be in the order of their lengths. Answers of one length are always in one bin.
    """
    bin_size = max(1, len(points) // LENGTH_BINS)
    means = list[Point]()
    part = list[Point]()
    for index, point in enumerate(points):
        part.append(point)
        is_last = index + 1 == len(points)
        if is_last or (len(part) >= bin_size and points[index + 1][0] != point[0]):
            means.append((fmean(x for x, _ in part), fmean(y for _, y in part)))
            part = []
    return means
