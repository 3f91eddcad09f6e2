"""The comparison as one page that needs nothing else: figures, curves of what runs share, and where their recipes
differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowrank_tune.ui import inert
from lowrank_tune.ui.compare.figures import rows
from lowrank_tune.ui.compare.side import Side, differences, shared, without_recipe
from lowrank_tune.ui.metrics import TITLES, meanings_of
from lowrank_tune.ui.report.charts import Line, smooth, thin
from lowrank_tune.ui.report.page import alerts, document, troubles
from lowrank_tune.ui.report.sections import NOT_LOG, chart_card
from lowrank_tune.ui.report.words import table, text

COLOURS, SELDOM = 6, 15  # lines of the style sheet; so few points are drawn as they are


def compare_page(sides: Sequence[Side]) -> str:
    """The page of these sides."""
    names = ", ".join(side.label for side in sides)
    told = [f"{side.label}: {trouble}" for side in sides for record in side.records for trouble in troubles(record)]
    header = (
        f'<header><div class="row"><h1>{text(names, 300)}</h1></div><p class="sub"><b>{len(sides)}</b> runs '
        f"side by side</p></header>"
    )
    status = "failed" if any(side.status == "failed" for side in sides) else ""
    body = "\n".join([header, alerts(told, status), _figures(sides), _curves(sides), _differences(sides)])
    return document(f"{names[:120]}: compared", body, "the events and summaries of these runs")


def _head(sides: Sequence[Side]) -> list[str]:
    return ["", *(f'<i class="key {_kind(place)}"></i> {text(side.label, 80)}' for place, side in enumerate(sides))]


def _kind(place: int) -> str:
    return f"run-{place % COLOURS}"


def _figures(sides: Sequence[Side]) -> str:
    made = [[text(label), *(_cell(label, cell) for cell in cells)] for label, cells in rows(sides)]
    return f'<h2>Side by side</h2><div class="card">{table(_head(sides), made)}</div>'


def _cell(label: str, cell: str) -> str:
    if label == "ended":
        return f'<span class="pill {"done" if cell.startswith("done") else text(cell)}">{text(cell)}</span>'
    return f"<b>{text(cell)}</b>" if label.startswith("held-out") else text(cell)


def _curves(sides: Sequence[Side]) -> str:
    places = {side.label: place for place, side in enumerate(sides)}
    cards = []
    for name, several in shared(sides):
        lines = [line for side in several if (line := _line(side, name, places[side.label])) is not None]
        started = several[0].last.started
        meaning = meanings_of(started.algorithm if started is not None else "sft").get(name, "")
        title = TITLES.get(name) or name.replace("_", " ").replace("heldout", "held-out")
        cards.append(chart_card(title, meaning, lines, name not in NOT_LOG, {}))
    chains = "; of a chain, those of the stage that began last" if any(side.chain is not None for side in sides) else ""
    told = f'<h2>Curves <span class="soft">smooth{chains}</span></h2>'
    return (
        f'{told}<div class="grid2">{"".join(cards)}</div>'
        if cards
        else "<p>No statistic was measured by two of these runs.</p>"
    )


def _line(side: Side, name: str, place: int) -> Line | None:
    points = [(float(step), value) for step, value in side.points(name).items() if math.isfinite(value)]
    drawn = points if len(points) <= SELDOM else smooth(points)
    return Line(inert(side.label, 60), _kind(place), thin(drawn, 150)) if points else None


def _differences(sides: Sequence[Side]) -> str:
    found, unknown = differences(sides), without_recipe(sides)
    told = (
        f"<p>The settings of {text(', '.join(unknown), 400)} are not known: there is no run.json that can be read.</p>"
        if unknown
        else ""
    )
    if not found:
        return f"<h2>Settings that differ</h2>{told or '<p>None: the recipes are the same.</p>'}"
    made = [
        [
            text(key, 200),
            *('<span class="soft">not set</span>' if value is None else text(value, 300) for value in values),
        ]
        for key, values in found.items()
    ]
    return f'<h2>Settings that differ</h2>{told}<div class="card">{table(_head(sides), made)}</div>'
