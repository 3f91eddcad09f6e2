"""The frontier: what the policy earned, and what it answered exactly, by how far it had gone from the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowrank_tune.ui.report.charts import RIGHT, WIDTH, Point, downsample, format_tick, smooth, ticks_of
from lowrank_tune.ui.report.plots import Axes
from lowrank_tune.ui.report.run_log import RunLog, StepValues

MIN_POINTS = 3  # steps at which both were measured


def section(run_log: RunLog) -> str:
    """The card with its heading; nothing where a run has no reward or no KL."""
    kl = run_log.series.get("kl", {})
    rewards = run_log.series.get("reward", {})
    reward_points = [
        (kl[step], reward)
        for step, reward in sorted(rewards.items())
        if step in kl and math.isfinite(kl[step] + reward)
    ]
    if len(reward_points) < MIN_POINTS:
        return ""
    accuracy_points = evals_by_kl(kl, run_log.series.get("heldout/accuracy", {}))
    legend = '<span><i class="key"></i>reward of a step, and its smooth course (left scale)</span>' + (
        '<span><i class="key check"></i>held-out exact answers (right scale)</span>' if accuracy_points else ""
    )
    return (
        f'<h2>Reward against KL</h2><div class="card"><p class="soft">How far the policy had gone from its reference '
        f"(nats a token), and "
        f"what it earned there. Where the reward climbs on and held-out answers get worse, the reward pays for "
        f"something else.</p>"
        f'{frontier_svg(reward_points, accuracy_points)}<div class="legend">{legend}</div></div>'
    )


def evals_by_kl(kl: StepValues, accuracy: StepValues) -> list[Point]:
    """Each evaluation at the KL that was measured last before it."""
    finite = {step: value for step, value in kl.items() if math.isfinite(value)}
    eval_points = []
    for step, share in sorted(accuracy.items()):
        if (earlier := [kl_step for kl_step in finite if kl_step <= step]) and math.isfinite(share):
            eval_points.append((finite[max(earlier)], share))
    return eval_points


def frontier_svg(reward_points: Sequence[Point], accuracy_points: Sequence[Point]) -> str:
    """The SVG: dots of the steps with their course in the order of the steps, and the evaluations on a scale of their
    own at the right."""
    xs, low_x, high_x = ticks_of([x for x, _ in [*reward_points, *accuracy_points]], 7)
    ys, low, high = ticks_of([y for _, y in reward_points])
    axes = Axes(low_x, high_x, low, high)
    dots = "".join(f"M{axes.at(point)}h0" for point in downsample(reward_points))
    course = zip(
        (x for _, x in smooth(list(enumerate(x for x, _ in reward_points)))),
        (y for _, y in smooth(list(enumerate(y for _, y in reward_points)))),
        strict=True,
    )
    parts = [
        axes.frame(xs, ys),
        f'<path class="dots smooth" d="{dots}"><title>reward</title></path>',
        f'<path class="smooth" d="M{"L".join(map(axes.at, downsample(list(course), 100)))}"><title>reward, '
        f"smooth</title></path>",
    ]
    if accuracy_points:
        shares, lowest, highest = ticks_of([y for _, y in accuracy_points])
        right_axes = Axes(low_x, high_x, lowest, highest)
        parts += [
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{right_axes.down(y) - 3:.1f}" text-anchor="end">'
            f"{100 * y:g} %</text>"
            for y in shares
        ]
        parts.append(
            f'<path class="check" d="M{"L".join(map(right_axes.at, downsample(accuracy_points, 100)))}">'
            "<title>held-out exact</title></path>"
        )
        parts += [
            f'<circle class="check" cx="{right_axes.across(x):.1f}" cy="{right_axes.down(y):.1f}" '
            f'r="2.6"><title>{100 * y:.1f} % exact at KL {format_tick(x)}</title></circle>'
            for x, y in downsample(accuracy_points, 100)
        ]
    return "".join(parts) + "</svg>"
