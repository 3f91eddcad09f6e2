"""The comparison in lines for a terminal or a file: charts of what runs share, where their recipes differ, and the
table at the end, where a person looks first. Pure: sides in, lines out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from lowrank_tune.ui.charts import Curve, chart, short, smooth
from lowrank_tune.ui.compare.figures import rows
from lowrank_tune.ui.compare.side import Side, differences, shared, without_recipe
from lowrank_tune.ui.frame import Line, beside, fit, said, wrap
from lowrank_tune.ui.metrics import TITLES

LOOKS = (("first", "*"), ("second", "o"), ("chosen", "+"), ("third", "x"), ("rejected", "#"), ("fourth", "@"))
"""Style and sign of a side; the seventh looks as the first."""
CHART_WIDTH, CHART_HEIGHT, MOST_COLUMNS, CHART_ROWS = 38, 9, 3, 2
LABEL, GAP, MOST_CELL, LEAST_CELL = 24, 2, 30, 12
MOST_KEYS = 14
LEVEL = 0.7  # of the moving average
SELDOM = 15  # so few points are drawn as they are


@dataclass(frozen=True)
class Paper:
    """What is drawn on. `signs`: lines are told apart by signs, where there are no colours; `ascii_only`: nothing but
    ASCII."""

    width: int
    signs: bool = False
    ascii_only: bool = False

    def text(self, value: str, limit: int = 200) -> str:
        return said(value.replace("\u2192", "->") if self.ascii_only else value, self.ascii_only, limit)


def screen(sides: Sequence[Side], paper: Paper) -> list[Line]:
    """All of it, in lines of at most the paper's width."""
    looks = {side.label: LOOKS[place % len(LOOKS)] for place, side in enumerate(sides)}
    parts = [_charts(sides, looks, paper), _differences(sides, paper), _table(sides, looks, paper)]
    lines = [line for part in parts if part for line in (*part, [("", "")])]
    return [_cut(line, paper.width) for line in lines[:-1]]


def _cut(line: Line, width: int) -> Line:
    """No longer than the paper is wide, and without blanks at its end."""
    fitted = fit(line, width)
    while fitted and not fitted[-1][0].strip():
        fitted.pop()
    return fitted


Looks = dict[str, tuple[str, str]]


def _charts(sides: Sequence[Side], looks: Looks, paper: Paper) -> list[Line]:
    found = shared(sides)
    columns = max(1, min(MOST_COLUMNS, paper.width // CHART_WIDTH, len(found)))
    drawn = found[: columns * CHART_ROWS]
    if not drawn:
        return [[("no statistic was measured by two of these runs, so there is no chart", "quiet")]]
    base, extra = divmod(paper.width - columns + 1, columns)
    widths = [base + (index < extra) for index in range(columns)]
    lines: list[Line] = []
    for at in range(0, len(drawn), columns):
        row = [
            _chart(name, several, looks, paper, widths[index])
            for index, (name, several) in enumerate(drawn[at : at + columns])
        ]
        lines += beside([*row, *([[]] * (columns - len(row)))], widths, CHART_HEIGHT)
    return lines


def _chart(name: str, sides: Sequence[Side], looks: Looks, paper: Paper, width: int) -> list[Line]:
    curves, title = [], [(f" {TITLES.get(name) or name.replace('_', ' ').replace('heldout', 'held-out')} ", "title")]
    for side in sides:
        style, sign = looks[side.label]
        points = [(float(step), value) for step, value in side.points(name).items()]
        curves.append(Curve(points if len(points) <= SELDOM else smooth(points, LEVEL), style, sign))
        title.append((f" {sign if paper.signs else ''}{short(points[-1][1])}", style))
    return [title, *chart(curves, width, CHART_HEIGHT - 1, False, paper.signs or paper.ascii_only)]


def _differences(sides: Sequence[Side], paper: Paper) -> list[Line]:
    """A line a setting: its name, and what it is on each side, in their order."""
    found, unknown = differences(sides), without_recipe(sides)
    lines: list[Line] = []
    if unknown:
        lines.append(
            [
                (
                    f"the settings of {paper.text(', '.join(unknown))} are not known: there is no run.json that can "
                    f"be read",
                    "warning",
                )
            ]
        )
    elif not found:
        return [[("the recipes are the same", "quiet")]]
    lines += [[("settings that differ, in the order of the runs", "title")]] if found else []
    for key, values in list(found.items())[:MOST_KEYS]:
        told = " | ".join("not set" if value is None else paper.text(value, 40) for value in values)
        head = paper.text(key, 60) + "  "
        parts = wrap(told, max(20, paper.width - len(head) - 2), 2)
        lines += [
            [("  ", ""), (head if row == 0 else " " * len(head), "quiet"), (part, "")] for row, part in enumerate(parts)
        ]
    if (left := len(found) - MOST_KEYS) > 0:
        lines.append([(f"  ... and {left} more, which the page lists", "quiet")])
    return lines


def _table(sides: Sequence[Side], looks: Looks, paper: Paper) -> list[Line]:
    """A column a side; where they do not all fit, several tables under each other."""
    figures = [(label, [paper.text(cell, MOST_CELL + 30) for cell in cells]) for label, cells in rows(sides)]
    names = [paper.text(side.label, MOST_CELL - 2) for side in sides]
    widths = [
        min(MOST_CELL, max(LEAST_CELL, cell_len(name) + 2, *(cell_len(cells[place]) for _, cells in figures)))
        for place, name in enumerate(names)
    ]
    lines: list[Line] = []
    start = 0
    while start < len(sides):
        end, room = start, paper.width - LABEL
        while end < len(sides) and (end == start or room >= widths[end] + GAP):
            room, end = room - widths[end] - GAP, end + 1
        lines += [[("", "")]] if lines else []
        head: Line = [(" " * LABEL, "")]
        for place in range(start, end):
            style, sign = looks[sides[place].label]
            head += [(" " * GAP, ""), *fit([(f"{sign} {names[place]}", style)], widths[place])]
        lines.append(head)
        for label, cells in figures:
            if any(cells[start:end]):
                line: Line = [(f"{label:<{LABEL}}", "quiet")]
                for place in range(start, end):
                    line += [(" " * GAP, ""), *fit([(cells[place], _style(label, cells[place]))], widths[place])]
                lines.append(line)
        start = end
    for side, name in zip(sides, names, strict=True):
        if side.last.ended is not None and side.status == "failed":
            told = paper.text(f"{name} failed: {side.last.ended.message or 'no reason is known'}", 2 * paper.width)
            lines += [[(part, "bad")] for part in wrap(told, paper.width, 2)]
    return lines


def _style(label: str, cell: str) -> str:
    if label == "ended":
        return "good" if cell.startswith("done") else "bad" if cell == "failed" else "warning"
    return "warning" if label == "reward hacking" and cell else "strong" if label == "held-out exact, after" else ""
