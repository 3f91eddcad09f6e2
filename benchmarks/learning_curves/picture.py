"""The picture: accuracy over CPU seconds and over steps, for each algorithm; a pale line for each seed, a strong one
for the mean, and the same colors in all charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from learning_curves.curves import METRICS, NAMES, Curve, Curves, Point, mean_by_seconds, mean_by_step

CHART_WIDTH, CHART_HEIGHT, GAP, HEAD, TITLE = 380, 170, 16, 44, 30
COLORS = {"ours": "#2f6fed", "trl": "#e2711d"}
WIDTHS = {"ours": 5, "trl": 2}
"""Widths of the means: where TRL's covers ours, both are visible."""
STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#14171c}"
    ".soft{fill:#5d6673;font-size:12px}.title{font-size:14px;font-weight:650}.grid{stroke:#e3e6eb}"
    ".tick{fill:#5d6673;font-size:16px}path{fill:none;stroke-linejoin:round}.chart{overflow:visible}"
    ".card{fill:#fff;stroke:#e3e6eb}"
    + "".join(
        f".{name}{{stroke:{color};stroke-width:{WIDTHS[name]}}}.{name}-seed{{stroke:{color};stroke-width:1.2;opacity:.45}}"
        for name, color in COLORS.items()
    )
)
TITLES = {"grpo": "GRPO", "dpo": "DPO"}


def picture(rows: Sequence[tuple[str, str, Curves]]) -> str:
    """Returns an SVG with a row of two charts for each algorithm and metric."""
    cards = []
    for algorithm, metric, curves in rows:
        title = f"{TITLES[algorithm]}: {METRICS[metric]} right"
        cards.append(_card(title, "CPU seconds", metric, curves, Curve.by_seconds, mean_by_seconds))
        cards.append(_card(title, "step", metric, curves, Curve.by_step, mean_by_step))
    width = 2 * CHART_WIDTH + 3 * GAP
    height = TITLE + len(rows) * (HEAD + CHART_HEIGHT + GAP) + GAP
    placed = [
        f'<g transform="translate({GAP + place % 2 * (CHART_WIDTH + GAP)} '
        f'{TITLE + GAP + place // 2 * (HEAD + CHART_HEIGHT + GAP)})">{card}</g>'
        for place, card in enumerate(cards)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>Time to accuracy, ours and TRL</title><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#f6f7f9"/>{_legend(rows[0][2])}{"".join(placed)}</svg>\n'
    )


def _legend(curves: Curves) -> str:
    spans = [f'<tspan dx="10" style="fill:{COLORS[name]};font-weight:650">{NAMES[name]}</tspan>' for name in curves]
    text = f"Held out; pale: one seed, strong: the mean of the seeds{''.join(spans)}"
    return f'<text class="soft" x="{GAP}" y="{GAP + 12}">{text}</text>'


def _card(
    title: str,
    x_title: str,
    metric: str,
    curves: Curves,
    points: Callable[[Curve, str], list[Point]],
    mean: Callable[[Sequence[Curve], str], list[Point]],
) -> str:
    lines = []
    for name, found in curves.items():
        lines += [(f"{name}-seed", NAMES[name], points(curve, metric)) for curve in found]
    lines += [(name, f"{NAMES[name]}, mean", mean(found, metric)) for name, found in curves.items()]
    return (
        f'<rect class="card" width="{CHART_WIDTH}" height="{HEAD + CHART_HEIGHT}" rx="10"/>'
        f'<text class="title" x="14" y="24">{escape(title)}</text>{_chart(x_title, lines)}'
    )


def _chart(x_title: str, lines: Sequence[tuple[str, str, list[Point]]]) -> str:
    from lowrank_tune.ui.svg import Plot
    from lowrank_tune.ui.svg_axes import linear_axis, share_axis

    points = [point for _, _, line in lines for point in line]
    plot = Plot(linear_axis([x for x, _ in points]), share_axis([y for _, y in points]), "learning", x_title)
    for kind, name, line in lines:
        plot.polyline(kind, line, name)
    size = f'<svg x="8" y="38" width="{CHART_WIDTH - 16}" height="{CHART_HEIGHT}" '
    return str(plot.svg()).replace("<svg ", size, 1)
