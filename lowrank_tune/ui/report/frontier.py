"""The frontier: what the policy earned, and what it answered exactly, by how far it had gone from the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowrank_tune.ui.report.charts import RIGHT, WIDTH, Point, short, smooth, thin, ticks_of
from lowrank_tune.ui.report.pictures import Plane
from lowrank_tune.ui.report.record import Points, Record

FEW = 3  # steps at which both were measured


def section(record: Record) -> str:
    """The card with its heading; nothing where a run has no reward or no KL."""
    kl, rewards = record.series.get("kl", {}), record.series.get("reward", {})
    earned = [
        (kl[step], reward)
        for step, reward in sorted(rewards.items())
        if step in kl and math.isfinite(kl[step] + reward)
    ]
    if len(earned) < FEW:
        return ""
    gold = by_distance(kl, record.series.get("heldout_exact", {}))
    told = '<span><i class="key"></i>reward of a step, and its smooth course (left scale)</span>' + (
        '<span><i class="key check"></i>held-out exact answers (right scale)</span>' if gold else ""
    )
    return (
        f'<h2>Reward against KL</h2><div class="card"><p class="soft">How far the policy had gone from its reference '
        f"(nats a token), and "
        f"what it earned there. Where the reward climbs on and held-out answers get worse, the reward pays for "
        f"something else.</p>"
        f'{picture(earned, gold)}<div class="legend">{told}</div></div>'
    )


def by_distance(kl: Points, gold: Points) -> list[Point]:
    """Each evaluation at the KL that was measured last before it."""
    finite = {step: value for step, value in kl.items() if math.isfinite(value)}
    found = []
    for step, share in sorted(gold.items()):
        if (earlier := [each for each in finite if each <= step]) and math.isfinite(share):
            found.append((finite[max(earlier)], share))
    return found


def picture(earned: Sequence[Point], gold: Sequence[Point]) -> str:
    """The SVG: dots of the steps with their course in the order of the steps, and the evaluations on a scale of their
    own at the right."""
    xs, low_x, high_x = ticks_of([x for x, _ in [*earned, *gold]], 7)
    ys, low, high = ticks_of([y for _, y in earned])
    plane = Plane(low_x, high_x, low, high)
    dots = "".join(f"M{plane.at(point)}h0" for point in thin(earned))
    course = zip(
        (x for _, x in smooth(list(enumerate(x for x, _ in earned)))),
        (y for _, y in smooth(list(enumerate(y for _, y in earned)))),
        strict=True,
    )
    parts = [
        plane.frame(xs, ys),
        f'<path class="dots smooth" d="{dots}"><title>reward</title></path>',
        f'<path class="smooth" d="M{"L".join(map(plane.at, thin(list(course), 100)))}"><title>reward, '
        f"smooth</title></path>",
    ]
    if gold:
        shares, least, most = ticks_of([y for _, y in gold])
        own = Plane(low_x, high_x, least, most)
        parts += [
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{own.down(y) - 3:.1f}" text-anchor="end">{100 * y:g} %</text>'
            for y in shares
        ]
        parts.append(
            f'<path class="check" d="M{"L".join(map(own.at, thin(gold, 100)))}"><title>held-out exact</title></path>'
        )
        parts += [
            f'<circle class="check" cx="{own.across(x):.1f}" cy="{own.down(y):.1f}" r="2.6"><title>{100 * y:.1f} % '
            f"exact at KL "
            f"{short(x)}</title></circle>"
            for x, y in thin(gold, 100)
        ]
    return "".join(parts) + "</svg>"
