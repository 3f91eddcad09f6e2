"""Reward against KL: the reward of the policy, and its exact held-out answers, by its distance from the reference."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from lowrank_tune.ui.formatting import format_tick
from lowrank_tune.ui.html import render
from lowrank_tune.ui.metrics import Point
from lowrank_tune.ui.report.run_log import RunLog
from lowrank_tune.ui.reward_vs_accuracy import by_kl
from lowrank_tune.ui.svg import RIGHT, WIDTH, Plot, downsample, smooth
from lowrank_tune.ui.svg_axes import linear_axis, share_axis

MIN_POINTS = 3
"""Steps at which both reward and KL were measured."""
X_TICKS = 7
MAX_COURSE_BUCKETS = 100


def section(run_log: RunLog) -> Markup:
    """Returns the card with its heading, empty for a run without reward or KL."""
    kl = run_log.points("kl")
    reward_points = by_kl(kl, run_log.points("reward"), same_step=True)
    if len(reward_points) < MIN_POINTS:
        return Markup()
    accuracy_points = by_kl(kl, run_log.points("heldout/accuracy"))
    return render(
        "frontier",
        svg=frontier_svg(reward_points, accuracy_points),
        has_accuracy=bool(accuracy_points),
    )


def frontier_svg(reward_points: Sequence[Point], accuracy_points: Sequence[Point]) -> Markup:
    """Returns the SVG: dots for the steps, a line through them in their order, and the evaluations on a scale of their
    own at the right."""
    kls = [kl for kl, _ in reward_points]
    rewards = [reward for _, reward in reward_points]
    x = linear_axis([*kls, *(kl for kl, _ in accuracy_points)], X_TICKS)
    plot = Plot(x, linear_axis(rewards), x_title="KL to the reference, nats per token")
    plot.dots("smooth", downsample(reward_points), "reward")
    course = list(
        zip(
            _smooth_values(kls),
            _smooth_values(rewards),
            strict=True,
        )
    )
    plot.polyline("smooth", downsample(course, MAX_COURSE_BUCKETS), "reward, smooth")
    if accuracy_points:
        _draw_accuracy(
            plot,
            downsample(accuracy_points, MAX_COURSE_BUCKETS),
            [share for _, share in accuracy_points],
        )
    return plot.svg()


def _draw_accuracy(
    plot: Plot,
    points: Sequence[Point],
    shares: Sequence[float],
) -> None:
    """Adds the evaluations, and the labels of their scale at the right edge."""
    plot.y = share_axis(shares)
    for share, label in plot.y.labels():
        plot.label(
            label,
            WIDTH - RIGHT,
            plot.y_at(share) - 3,
            "end",
        )
    plot.polyline("check", points, "held-out exact")
    for kl, share in points:
        plot.circle(
            "check",
            (kl, share),
            f"{100 * share:.1f} % exact at KL {format_tick(kl)}",
        )


def _smooth_values(values: Sequence[float]) -> list[float]:
    return [value for _, value in smooth(list(enumerate(values)))]
