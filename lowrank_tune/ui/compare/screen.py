"""The comparison in lines for a terminal or a file: charts of what runs share, where their recipes differ, and the
table at the end, where a person looks first. Pure: sides in, lines out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from lowrank_tune.ui.compare.figures import rows
from lowrank_tune.ui.compare.runs import ComparedRun, common_metrics, differences, without_recipe
from lowrank_tune.ui.metrics import TITLES
from lowrank_tune.ui.terminal.charts import Curve, chart, format_number, smooth
from lowrank_tune.ui.terminal.text_layout import Line, fit, sanitize, side_by_side, wrap

LINE_STYLES = (("first", "*"), ("second", "o"), ("chosen", "+"), ("third", "x"), ("rejected", "#"), ("fourth", "@"))
"""Style and sign of a side; the seventh looks as the first."""
CHART_WIDTH = 38
CHART_HEIGHT = 9
MAX_COLUMNS = 3
CHART_ROWS = 2
LABEL_WIDTH = 24
GAP = 2
MAX_CELL = 30
MIN_CELL = 12
MAX_KEYS = 14
SMOOTHING = 0.7  # of the moving average
MIN_POINTS_TO_SMOOTH = 15  # so few points are drawn as they are


@dataclass(frozen=True)
class TextCanvas:
    """What is drawn on. `signs`: lines are told apart by signs, where there are no colors; `ascii_only`: nothing but
    ASCII."""

    width: int
    signs: bool = False
    ascii_only: bool = False

    def text(self, value: str, limit: int = 200) -> str:
        return sanitize(value.replace("\u2192", "->") if self.ascii_only else value, self.ascii_only, limit)


def screen(runs: Sequence[ComparedRun], canvas: TextCanvas) -> list[Line]:
    """All of it, in lines of at most the paper's width."""
    styles = {run.label: LINE_STYLES[index % len(LINE_STYLES)] for index, run in enumerate(runs)}
    parts = [_charts(runs, styles, canvas), _differences(runs, canvas), _table(runs, styles, canvas)]
    lines = [line for part in parts if part for line in (*part, [("", "")])]
    return [_cut(line, canvas.width) for line in lines[:-1]]


def _cut(line: Line, width: int) -> Line:
    """No longer than the paper is wide, and without blanks at its end."""
    fitted = fit(line, width)
    while fitted and not fitted[-1][0].strip():
        fitted.pop()
    return fitted


LineStyles = dict[str, tuple[str, str]]


def _charts(runs: Sequence[ComparedRun], styles: LineStyles, canvas: TextCanvas) -> list[Line]:
    shared_metrics = common_metrics(runs)
    columns = max(1, min(MAX_COLUMNS, canvas.width // CHART_WIDTH, len(shared_metrics)))
    drawn = shared_metrics[: columns * CHART_ROWS]
    if not drawn:
        return [[("no statistic was measured by two of these runs, so there is no chart", "quiet")]]
    base, extra = divmod(canvas.width - columns + 1, columns)
    widths = [base + (index < extra) for index in range(columns)]
    lines: list[Line] = []
    for at in range(0, len(drawn), columns):
        row = [
            _chart(name, metric_runs, styles, canvas, widths[index])
            for index, (name, metric_runs) in enumerate(drawn[at : at + columns])
        ]
        lines += side_by_side([*row, *([[]] * (columns - len(row)))], widths, CHART_HEIGHT)
    return lines


def _chart(
    name: str,
    runs: Sequence[ComparedRun],
    styles: LineStyles,
    canvas: TextCanvas,
    width: int,
) -> list[Line]:
    curves = []
    title = [(f" {TITLES.get(name) or name.replace('_', ' ').replace('heldout', 'held-out')} ", "title")]
    for run in runs:
        style, sign = styles[run.label]
        points = [(float(step), value) for step, value in run.points(name).items()]
        curves.append(Curve(points if len(points) <= MIN_POINTS_TO_SMOOTH else smooth(points, SMOOTHING), style, sign))
        title.append((f" {sign if canvas.signs else ''}{format_number(points[-1][1])}", style))
    return [title, *chart(curves, width, CHART_HEIGHT - 1, False, canvas.signs or canvas.ascii_only)]


def _differences(runs: Sequence[ComparedRun], canvas: TextCanvas) -> list[Line]:
    """A line a setting: its name, and what it is on each side, in their order."""
    changed_settings = differences(runs)
    unknown = without_recipe(runs)
    lines: list[Line] = []
    if unknown:
        lines.append(
            [
                (
                    f"the settings of {canvas.text(', '.join(unknown))} are not known: there is no run.json that can "
                    f"be read",
                    "warning",
                )
            ]
        )
    elif not changed_settings:
        return [[("the recipes are the same", "quiet")]]
    lines += [[("settings that differ, in the order of the runs", "title")]] if changed_settings else []
    for key, values in list(changed_settings.items())[:MAX_KEYS]:
        text = " | ".join("not set" if value is None else canvas.text(value, 40) for value in values)
        head = canvas.text(key, 60) + "  "
        parts = wrap(text, max(20, canvas.width - len(head) - 2), 2)
        lines += [
            [("  ", ""), (head if row == 0 else " " * len(head), "quiet"), (part, "")] for row, part in enumerate(parts)
        ]
    if (left := len(changed_settings) - MAX_KEYS) > 0:
        lines.append([(f"  ... and {left} more, which the page lists", "quiet")])
    return lines


def _table(runs: Sequence[ComparedRun], styles: LineStyles, canvas: TextCanvas) -> list[Line]:
    """A column a side; where they do not all fit, several tables under each other."""
    figures = [(label, [canvas.text(cell, MAX_CELL + 30) for cell in cells]) for label, cells in rows(runs)]
    names = [canvas.text(run.label, MAX_CELL - 2) for run in runs]
    widths = [
        min(MAX_CELL, max(MIN_CELL, cell_len(name) + 2, *(cell_len(cells[index]) for _, cells in figures)))
        for index, name in enumerate(names)
    ]
    lines: list[Line] = []
    start = 0
    while start < len(runs):
        end = start
        room = canvas.width - LABEL_WIDTH
        while end < len(runs) and (end == start or room >= widths[end] + GAP):
            room = room - widths[end] - GAP
            end = end + 1
        lines += [[("", "")]] if lines else []
        head: Line = [(" " * LABEL_WIDTH, "")]
        for index in range(start, end):
            style, sign = styles[runs[index].label]
            head += [(" " * GAP, ""), *fit([(f"{sign} {names[index]}", style)], widths[index])]
        lines.append(head)
        for label, cells in figures:
            if any(cells[start:end]):
                line: Line = [(f"{label:<{LABEL_WIDTH}}", "quiet")]
                for index in range(start, end):
                    line += [(" " * GAP, ""), *fit([(cells[index], _style(label, cells[index]))], widths[index])]
                lines.append(line)
        start = end
    for run, name in zip(runs, names, strict=True):
        if run.last.ended is not None and run.status == "failed":
            message = canvas.text(f"{name} failed: {run.last.ended.message or 'no reason is known'}", 2 * canvas.width)
            lines += [[(part, "bad")] for part in wrap(message, canvas.width, 2)]
    return lines


def _style(label: str, cell: str) -> str:
    if label == "ended":
        if cell.startswith("done"):
            return "good"
        if cell == "failed":
            return "bad"
        return "warning"
    if label == "reward hacking" and cell:
        return "warning"
    if label == "held-out exact, after":
        return "strong"
    return ""
