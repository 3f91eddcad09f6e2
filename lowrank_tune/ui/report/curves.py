"""The charts of a run's statistics, one card for each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from lowrank_tune.config.schema import ONLINE_ALGORITHMS
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import format_tick, is_share, percent
from lowrank_tune.ui.html import render
from lowrank_tune.ui.metrics import (
    Point,
    chart_title,
    descriptions_of,
    pair_side,
    paired_metric,
    reward_names,
)
from lowrank_tune.ui.report.run_log import RunLog, in_order
from lowrank_tune.ui.svg import (
    Series,
    downsample,
    line_chart,
    smooth,
)

WITHOUT_LOG_SCALE = "explained_variance"
"""Like shares: a logarithmic scale would show nothing more."""
NONZERO_ONLY = ("skipped_steps", "overflowed_steps", "oom_retries")
MIN_LOG_SPAN = 3
"""Largest value over the smallest from which on a logarithmic scale is offered."""
SMOOTHED_BUCKETS = 100
MAX_NAME = 60
MIN_ROUGH_POINTS = 12
MIN_ROUGH_TURNS = 1 / 5
"""Turns of a line, up or down, for each of its points."""


@dataclass(frozen=True)
class ChartCard:
    """A chart with its title and its description, and what its tooltip shows."""

    title: str
    description: str
    series: Sequence[Series]
    svg: Markup
    log_svg: Markup
    tooltip_data: Markup
    last: str = ""
    metric: str = ""
    is_share: bool = False


def curves(run_log: RunLog) -> Markup:
    """Returns a card for each statistic, the validation beside the step. Figures of held-out prompts and pairs have a
    table instead."""
    algorithm = run_log.algorithm
    descriptions = _ordered_descriptions(run_log)
    partners = {paired_metric(algorithm, name) for name in descriptions}
    measured = {
        *run_log.series,
        *(name.removeprefix("eval_") for name in run_log.checks),
    }
    others = sorted(name for name in measured if name not in descriptions and name not in partners)
    cards = []
    for name in (*descriptions, *others):
        card = _curve(
            name,
            descriptions.get(name, ""),
            paired_metric(algorithm, name),
            run_log,
        )
        if card is not None:
            cards.append(card)
    return render("curves", cards=cards) if cards else Markup()


def _ordered_descriptions(run_log: RunLog) -> dict[str, str]:
    """Returns the description of each statistic. The curves of several rewards follow that of their sum."""
    descriptions = descriptions_of(run_log.algorithm)
    if run_log.algorithm not in ONLINE_ALGORITHMS:
        return descriptions
    ordered = {}
    for name, description in descriptions.items():
        ordered[name] = description
        if name == "reward":
            ordered |= dict.fromkeys(
                sorted(reward_names(run_log.series)),
                "this reward by itself",
            )
    return ordered


def _curve(
    name: str,
    description: str,
    partner: str | None,
    run_log: RunLog,
) -> ChartCard | None:
    points = run_log.series.get(name, {})
    checks = run_log.checks.get(f"eval_{name}", {})
    if name.startswith(("heldout/", "pairs/")) and not points:
        return None
    if name in NONZERO_ONLY and not any(points.values()):
        return None
    if partner is None:
        series = metric_series(
            chart_title(name),
            points,
            checks,
            chart_title(f"eval_{name}"),
        )
        return chart_card(
            name,
            description,
            series,
            points or checks,
        )
    sides = {side: run_log.series.get(side) or run_log.checks.get(f"eval_{side}", {}) for side in (name, partner)}
    return chart_card(
        name,
        description,
        pair_series(sides),
        points or checks,
    )


def chart_card(
    name: str,
    description: str,
    series: Sequence[Series],
    points: Mapping[int, float],
) -> ChartCard | None:
    """Returns the card of a metric's chart, None if nothing can be drawn. `points` are those whose last value is
    shown."""
    as_percent = is_share(name)
    svg = line_chart(series, is_share=as_percent)
    if not svg:
        return None
    values = [value for line in series for _, value in line.points]
    may_log = not as_percent and name != WITHOUT_LOG_SCALE
    has_log = may_log and min(values) > 0 and max(values) / min(values) > MIN_LOG_SPAN
    last = points[max(points)] if points else math.nan
    return ChartCard(
        chart_title(name),
        description,
        series,
        svg,
        line_chart(series, log=True) if has_log else Markup(),
        _tooltip_data(series),
        _last_value(last, as_percent) if points else "",
        name,
        as_percent,
    )


def _last_value(
    value: float,
    as_percent: bool,
) -> str:
    """Returns the value in words; that of a step that diverged is `nan` or `inf`."""
    if not math.isfinite(value):
        return str(value)
    return percent(value) if as_percent else format_tick(value)


def _tooltip_data(series: Iterable[Series]) -> Markup:
    """Returns the names and the points of the lines as JSON for an attribute."""
    data = []
    for line in series:
        points = [[x, float(f"{y:.4g}")] for x, y in line.points if math.isfinite(y)]
        data.append([line.name, points])
    return escape(json.dumps(data, separators=(",", ":")))


def metric_series(
    name: str,
    points: Mapping[int, float],
    checks: Mapping[int, float],
    check_name: str,
) -> list[Series]:
    """Returns the lines of one statistic: its steps, over a rough line a smooth one, and its validations."""
    # names of statistics come from a file that anyone may have edited
    name = escape_control_chars(name, MAX_NAME)
    check_name = escape_control_chars(check_name, MAX_NAME)
    steps = in_order(points)
    finite = [point for point in steps if math.isfinite(point[1])]
    is_rough = _is_rough(finite)
    series = []
    if steps:
        series.append(
            Series(
                name,
                "raw" if is_rough else "smooth",
                downsample(steps),
            )
        )
    if is_rough:
        series.append(
            Series(
                "smoothed",
                "smooth",
                downsample(smooth(finite), SMOOTHED_BUCKETS),
            )
        )
    if checks:
        series.append(
            Series(
                check_name,
                "check",
                downsample(in_order(checks), SMOOTHED_BUCKETS),
            )
        )
    return series


def pair_series(sides: Mapping[str, Mapping[int, float]]) -> list[Series]:
    """Returns the lines of both sides of a pair, smooth ones alone: two rough ones could not be distinguished."""
    series = []
    for name, points in sides.items():
        finite = [point for point in in_order(points) if math.isfinite(point[1])]
        if finite:
            drawn = smooth(finite) if _is_rough(finite) else finite
            series.append(
                Series(
                    pair_side(name),
                    pair_side(name),
                    downsample(drawn),
                )
            )
    return series


def _is_rough(points: Sequence[Point]) -> bool:
    """Returns whether a line goes up and down so often that a smooth one is easier to read."""
    turns = 0
    last_move = 0.0
    for (_, before), (_, value) in zip(
        points,
        points[1:],
        strict=False,
    ):
        move = value - before
        if value != before:
            turns += move * last_move < 0
            last_move = move
    return len(points) > MIN_ROUGH_POINTS and turns > len(points) * MIN_ROUGH_TURNS
