"""The chart pane: one statistic with its average and its validation, or several statistics in one chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_tune.config.schema import ONLINE_ALGORITHMS
from lowrank_tune.ui.formatting import METRIC_FORMATS, is_share
from lowrank_tune.ui.metrics import (
    BAND_METRIC,
    SIDE_TITLES,
    TITLES,
    Point,
    Points,
    charts_of,
    metric_label,
    pair_side,
    reward_label,
    reward_names,
)
from lowrank_tune.ui.reward_vs_accuracy import frontier
from lowrank_tune.ui.state import Series, State
from lowrank_tune.ui.terminal.charts import Curve, chart, format_number, smooth
from lowrank_tune.ui.terminal.outliers import split_outliers
from lowrank_tune.ui.terminal.panes import SMOOTHINGS, View, labeled_value
from lowrank_tune.ui.terminal.text_layout import Block, Line

PLAIN_FORMAT_METRICS = (
    "accuracy",
    "mean_token_accuracy",
    "rewards/accuracies",
    "learning_rate",
    "heldout/accuracy",
    "frac_reward_zero_std",
    "completions/clipped_ratio",
    "clip_ratio",
    "value_clip_ratio",
    "completions/mean_length",
)
"""Metrics that have the same format here and in the plain log."""
DIVERGENCES = ("kl", "approx_kl")
MIN_DIVERGENCE = 1e-8
"""Nats a token below which a divergence is shown as 0."""
FRONTIER = "reward against KL"
"""The only chart whose x axis is not the step."""
FRONTIER_INDEX = 5
REWARDS_INDEX = 3
"""Places of these charts among those of the algorithm."""
MIN_FRONTIER_DOTS = 3
MIN_SPAN = 0.2
"""Share of the held-out questions that fills the height of the chart at least: small changes must look small."""


@dataclass(frozen=True)
class LineStyle:
    """How one of several statistics in a chart is named and drawn."""

    label: str
    style: str
    sign: str


LINE_STYLES = (("first", "*"), ("second", "o"), ("chosen", "+"), ("rejected", "-"))
"""Style and ASCII sign of rewards that share a chart; the fifth reward has those of the first."""
SIDE_SIGNS = {"chosen": "+", "rejected": "-"}


def chart_names(state: State) -> list[tuple[str, ...]]:
    """Returns the metrics of each chart: first the measured ones of the algorithm, then those that only some runs have.
    Several rewards share a chart."""
    charts = list[tuple[str, ...]]()
    for names in charts_of(state.algorithm):
        measured = tuple(name for name in names if _shown_series(state, name))
        if measured:
            charts.append(measured)
    for name in ("reward", "heldout/accuracy"):
        if name in state.series and (name,) not in charts:
            charts.append((name,))
    if state.algorithm in ONLINE_ALGORITHMS:
        # insert appends if the list is shorter than the index
        rewards = tuple(reward_names(state.series))
        if len(rewards) > 1:
            charts.insert(REWARDS_INDEX, rewards)
        if len(frontier(state)) >= MIN_FRONTIER_DOTS:
            charts.insert(FRONTIER_INDEX, (FRONTIER,))
    return charts


def format_value(name: str, value: float) -> str:
    """Returns a value of a metric in few digits."""
    if name in PLAIN_FORMAT_METRICS:
        _, write = METRIC_FORMATS[name]
        return write(value)
    if value != value:
        return "nan"
    return format_number(without_rounding(name, value))


def without_rounding(name: str, value: float) -> float:
    """Returns 0 for a divergence that is only the rounding error of equal distributions."""
    is_rounding = name in DIVERGENCES and abs(value) < MIN_DIVERGENCE
    return 0.0 if is_rounding else value


def chart_pane(
    state: State,
    names: Sequence[str],
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns a title with the last values, and the chart below it.

    A single statistic has dim dots for its values, a bright line for their average and a second color for validation.
    Several statistics, the sides of a pair or rewards, have their averages only, each in its own color.
    """
    if names == (FRONTIER,):
        return _frontier_pane(state, view, width, height)
    outliers: Points = ()
    if len(names) == 1:
        values = _last_values(state, names[0], view)
        curves, outliers = _curves(state, names[0], view)
        log = view.log_scale
    else:
        values, curves = _shared_chart(state, names, view)
        log = view.log_scale and all(y > 0 for curve in curves for _, y in curve.points)
    title: Line = [(f" {chart_title_of(names, view)} ", "title")]
    if log:
        title.append(("log ", "quiet"))
    return [
        [*title, *values],
        *chart(
            curves,
            width,
            height - 1,
            log,
            view.ascii_only,
            share=is_share(names[0]),
            outliers=outliers,
        ),
    ]


def chart_title_of(names: Sequence[str], view: View) -> str:
    """Returns the title of a chart in words."""
    first = names[0]
    if len(names) == 1:
        known = TITLES.get(first)
    elif reward_names([first]):
        known = "rewards"
    else:
        known = SIDE_TITLES.get(first)
    return known or view.sanitize(metric_label(first))


def _frontier_pane(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the chart of the reward by the KL to the reference. Held-out accuracy is scaled to the same height: only
    its shape matters here. Steps whose KL is far from all others are left out, and named in the title."""
    rewards, outliers = _split_by_kl(frontier(state))
    highest_kl = max(kl for kl, _ in rewards)
    accuracy = [point for point in frontier(state, "heldout/accuracy") if point[0] <= highest_kl]
    curves = [Curve(rewards, "first", "*")]
    title: Line = [(" reward against KL  ", "title"), ("reward", "first")]
    if accuracy:
        curves.append(Curve(_scaled_to(rewards, accuracy), "second", "o"))
        title.append(("  exact", "second"))
    if outliers:
        sign = ">" if view.ascii_only else "\u25b6"
        named = f"  {sign} {_format_kl(max(outliers))}"
        has_room = sum(len(text) for text, _ in title) + len(named) <= width
        title.append((named if has_room else f"  {sign}", "quiet"))
    return [
        title,
        *chart(
            curves,
            width,
            height - 1,
            False,
            view.ascii_only,
            format_x=_format_kl,
        ),
    ]


def _split_by_kl(points: Points) -> tuple[list[Point], list[float]]:
    """Returns the points whose KL is no outlier, and the KL of the others."""
    bulk, far = split_outliers([(index, kl) for index, (kl, _) in enumerate(points)])
    kept = {index for index, _ in bulk}
    return [point for index, point in enumerate(points) if index in kept], [kl for _, kl in far]


def _format_kl(value: float) -> str:
    return format_number(without_rounding("kl", value))


def _scaled_to(rewards: Points, accuracy: Points) -> list[Point]:
    """Returns the points of the accuracy, scaled to the range of the rewards."""
    low = min(y for _, y in rewards)
    high = max(y for _, y in rewards)
    highest = max(y for _, y in accuracy)
    lowest = min(highest - MIN_SPAN, *(y for _, y in accuracy))
    span = highest - lowest
    return [(x, low + (y - lowest) / span * (high - low)) for x, y in accuracy]


def _shown_series(state: State, name: str) -> Series | None:
    """Returns the values of training, else those of validation."""
    return state.series.get(name) or state.series.get(f"eval_{name}")


def _shared_chart(
    state: State,
    names: Sequence[str],
    view: View,
) -> tuple[Line, list[Curve]]:
    """Returns the last value and the curve of each of several statistics."""
    values: Line = []
    curves = list[Curve]()
    for name, line in zip(names, _line_styles(names), strict=True):
        series = _shown_series(state, name)
        if series is None:
            continue
        values += labeled_value(
            f"{view.sanitize(line.label, 16)} ",
            f"{format_value(name, series.last)} ",
            line.style,
        )
        curves.append(Curve(_average(series, view), line.style, line.sign))
    return values, curves


def _line_styles(names: Sequence[str]) -> list[LineStyle]:
    sides = [pair_side(name) for name in names]
    if all(sides):
        return [LineStyle(side, side, SIDE_SIGNS[side]) for side in sides]
    lines = []
    for index, name in enumerate(names):
        style, sign = LINE_STYLES[index % len(LINE_STYLES)]
        lines.append(LineStyle(reward_label(name), style, sign))
    return lines


def _average(series: Series, view: View) -> Points:
    return smooth(series.points, SMOOTHINGS[view.smoothing])


def _curves(
    state: State,
    name: str,
    view: View,
) -> tuple[list[Curve], Points]:
    """Returns the curves of a single statistic, and its outliers. A logarithmic scale has room for them."""
    curves = list[Curve]()
    outliers: Points = ()
    series = state.series.get(name)
    if series is not None and name == "heldout/accuracy":
        # there are only few points, so they are not smoothed
        return [Curve(series.points)], ()
    if series is not None:
        points = drawn_points(name, series)
        if not view.log_scale and name not in BAND_METRIC:
            points, outliers = split_outliers(points)
        curves += _background(state, name, points, view)
        curves.append(Curve(smooth(points, SMOOTHINGS[view.smoothing])))
    validation = state.series.get(f"eval_{name}")
    if validation is not None:
        curves.append(Curve(validation.points, "second", "o"))
    return curves, outliers


def drawn_points(name: str, series: Series) -> Points:
    """Returns the points of a statistic, without rounding errors."""
    if name not in DIVERGENCES:
        return series.points
    return [(x, without_rounding(name, y)) for x, y in series.points]


def _background(
    state: State,
    name: str,
    points: Points,
    view: View,
) -> list[Curve]:
    """Returns a band if the statistic has a spread, else its values as dots unless smoothing is off."""
    spread = state.series.get(BAND_METRIC.get(name, ""))
    if spread is not None:
        limits = _band_limits(state, points)
        return [_band_edge(points, spread, view, sign, limits) for sign in (1, -1)]
    if SMOOTHINGS[view.smoothing]:
        return [
            Curve(
                points,
                "quiet",
                ".",
                line=False,
            )
        ]
    return []


def _band_limits(state: State, points: Points) -> tuple[float, float]:
    """Returns the values that the band does not leave: 0 and 1 as long as all rewards are within."""
    values = [y for _, y in points if math.isfinite(y)]
    values += state.reward_range or ()
    if all(0 <= value <= 1 for value in values):
        return 0.0, 1.0
    return -math.inf, math.inf


def _band_edge(
    points: Points,
    spread: Series,
    view: View,
    sign: int,
    limits: tuple[float, float],
) -> Curve:
    """Returns the average of the statistic plus (sign 1) or minus (sign -1) its spread, within the limits."""
    low, high = limits
    edge = []
    for (x, y), (_, around) in zip(points, spread.points, strict=False):
        # a limit would replace nan
        if math.isfinite(y + around):
            edge.append((x, min(high, max(low, y + sign * around))))
    return Curve(smooth(edge, SMOOTHINGS[view.smoothing]), "quiet", ".")


def _last_values(
    state: State,
    name: str,
    view: View,
) -> Line:
    """Returns the last value of a single statistic, its spread and its validation, as far as they were measured."""
    values: Line = []
    last = state.last(name)
    if last is not None:
        values.append((format_value(name, last), "first"))
    spread = state.last(BAND_METRIC.get(name, ""))
    if spread is not None:
        plus_minus = view.symbol("\u00b1", "+-")
        values.append((f" {plus_minus} {format_value(name, spread)}", "quiet"))
    validation = state.last(f"eval_{name}")
    if validation is not None:
        values += labeled_value("  validation ", format_value(name, validation), "second")
    return values
