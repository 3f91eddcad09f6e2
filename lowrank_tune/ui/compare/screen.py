"""The comparison in lines for a terminal or a file: charts of the common statistics, the settings that differ, and last
the table of figures, which is then visible without scrolling. No terminal is touched here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from lowrank_tune.ui.compare.figures import Row, rows
from lowrank_tune.ui.compare.runs import (
    MIN_POINTS_TO_SMOOTH,
    ComparedRun,
    common_metrics,
    differences,
    without_recipe,
)
from lowrank_tune.ui.metrics import chart_title
from lowrank_tune.ui.terminal.charts import (
    Curve,
    chart,
    format_number,
    smooth,
)
from lowrank_tune.ui.terminal.text_layout import (
    Line,
    column_widths,
    fit,
    sanitize,
    side_by_side,
    wrap,
)

LINE_STYLES = (
    ("first", "*"),
    ("second", "o"),
    ("chosen", "+"),
    ("third", "x"),
    ("rejected", "#"),
    ("fourth", "@"),
)
"""Style and sign of each run; the seventh run has those of the first."""
CHART_WIDTH = 38
CHART_HEIGHT = 9
MAX_COLUMNS = 3
CHART_ROWS = 2
LABEL_WIDTH = 25
GAP = 2
MAX_CELL = 30
MIN_CELL = 12
MAX_SETTINGS = 14
SMOOTHING = 0.7
"""Weight of the moving average."""

LineStyles = dict[str, tuple[str, str]]
"""Style and sign of a run by its label."""


@dataclass(frozen=True)
class TextCanvas:
    """The width and the characters of the output. `signs`: signs instead of colors distinguish the lines of a chart."""

    width: int
    signs: bool = False
    ascii_only: bool = False

    def text(self, value: str, limit: int = 200) -> str:
        """Returns text for this output: without control characters, and if required in ASCII."""
        if self.ascii_only:
            value = value.replace("\u2192", "->")
        return sanitize(value, self.ascii_only, limit)


def screen(runs: Sequence[ComparedRun], canvas: TextCanvas) -> list[Line]:
    """Returns the whole comparison in lines of at most the width of the canvas."""
    styles = {run.label: LINE_STYLES[index % len(LINE_STYLES)] for index, run in enumerate(runs)}
    lines: list[Line] = []
    for part in (
        _charts(runs, styles, canvas),
        _differences(runs, canvas),
        _table(runs, styles, canvas),
    ):
        if lines:
            lines.append([])
        lines += part
    return [_cut(line, canvas.width) for line in lines]


def _cut(line: Line, width: int) -> Line:
    """Returns at most `width` cells of a line, without blanks at its end."""
    fitted = fit(line, width)
    while fitted and not fitted[-1][0].strip():
        fitted.pop()
    return fitted


def _charts(
    runs: Sequence[ComparedRun],
    styles: LineStyles,
    canvas: TextCanvas,
) -> list[Line]:
    metrics = common_metrics(runs)
    if not metrics:
        return [
            [
                (
                    "no statistic was measured by two of these runs, so there is no chart",
                    "quiet",
                )
            ]
        ]
    columns = max(1, min(MAX_COLUMNS, canvas.width // CHART_WIDTH, len(metrics)))
    widths = column_widths(canvas.width, columns)
    lines: list[Line] = []
    for start in range(0, min(len(metrics), columns * CHART_ROWS), columns):
        blocks: list[list[Line]] = []
        for (name, metric_runs), block_width in zip(metrics[start : start + columns], widths, strict=False):
            blocks.append(
                _chart(
                    name,
                    metric_runs,
                    styles,
                    canvas,
                    block_width,
                )
            )
        lines += side_by_side(blocks, widths[: len(blocks)], CHART_HEIGHT)
    return lines


def _chart(
    name: str,
    runs: Sequence[ComparedRun],
    styles: LineStyles,
    canvas: TextCanvas,
    width: int,
) -> list[Line]:
    """Returns the title with the last value of each run, and below it the chart."""
    curves = []
    title = [(f" {chart_title(name)} ", "title")]
    for run in runs:
        style, sign = styles[run.label]
        points = run.curve(name)
        drawn = smooth(points, SMOOTHING) if len(points) > MIN_POINTS_TO_SMOOTH else points
        curves.append(Curve(drawn, style, sign))
        shown_sign = sign if canvas.signs else ""
        title.append((f" {shown_sign}{format_number(points[-1][1])}", style))
    return [
        title,
        *chart(
            curves,
            width,
            CHART_HEIGHT - 1,
            False,
            canvas.signs or canvas.ascii_only,
        ),
    ]


def _differences(runs: Sequence[ComparedRun], canvas: TextCanvas) -> list[Line]:
    """Returns a line for each setting: its name, and its value in each run, in their order."""
    changed = differences(runs)
    unknown = without_recipe(runs)
    lines: list[Line] = []
    if unknown:
        labels = canvas.text(", ".join(unknown))
        message = f"the settings of {labels} are not known: there is no run.json that can be read"
        lines.append([(message, "warning")])
    elif not changed:
        return [[("the recipes are the same", "quiet")]]
    if changed:
        lines.append([("settings that differ, in the order of the runs", "title")])
    for key, values in list(changed.items())[:MAX_SETTINGS]:
        lines += _setting(key, values, canvas)
    left = len(changed) - MAX_SETTINGS
    if left > 0:
        lines.append([(f"  ... and {left} more, which the page lists", "quiet")])
    return lines


def _setting(
    key: str,
    values: Iterable[str | None],
    canvas: TextCanvas,
) -> list[Line]:
    written = ["not set" if value is None else canvas.text(value, 40) for value in values]
    head = canvas.text(key, 60) + "  "
    lines: list[Line] = []
    for part in wrap(" | ".join(written), max(20, canvas.width - len(head) - 2), 2):
        lines.append([("  ", ""), (head, "quiet"), (part, "")])
        head = " " * len(head)
    return lines


def _table(
    runs: Sequence[ComparedRun],
    styles: LineStyles,
    canvas: TextCanvas,
) -> list[Line]:
    """Returns a table with a column for each run, or several tables below each other if they are too wide."""
    figures = [(label, [canvas.text(cell, MAX_CELL + 30) for cell in cells]) for label, cells in rows(runs)]
    names = [canvas.text(run.label, MAX_CELL - 2) for run in runs]
    heads = []
    widths = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        style, sign = styles[run.label]
        heads.append((f"{sign} {name}", style))
        longest = max(
            cell_len(name) + 2,
            *(cell_len(cells[index]) for _, cells in figures),
        )
        widths.append(min(MAX_CELL, max(MIN_CELL, longest)))
    lines: list[Line] = []
    start = 0
    while start < len(runs):
        end = _end_of_columns(widths, start, canvas.width - LABEL_WIDTH)
        if lines:
            lines.append([("", "")])
        lines += _columns(
            figures,
            heads,
            widths,
            range(start, end),
        )
        start = end
    return lines + _failures(runs, names, canvas)


def _end_of_columns(
    widths: Sequence[int],
    start: int,
    room: int,
) -> int:
    """Returns the end of the columns that fit into `room` cells; at least one column."""
    end = start
    while end < len(widths) and (end == start or room >= widths[end] + GAP):
        room -= widths[end] + GAP
        end += 1
    return end


def _columns(
    figures: Iterable[Row],
    heads: Sequence[tuple[str, str]],
    widths: Sequence[int],
    columns: Sequence[int],
) -> list[Line]:
    """Returns the table of some of the columns, without the rows that are empty in them."""
    head: Line = [(" " * LABEL_WIDTH, "")]
    for index in columns:
        head += [(" " * GAP, ""), *fit([heads[index]], widths[index])]
    lines = [head]
    for label, cells in figures:
        if not any(cells[index] for index in columns):
            continue
        line: Line = [(f"{label:<{LABEL_WIDTH}}", "quiet")]
        for index in columns:
            cell = (cells[index], _style(label, cells[index]))
            line += [(" " * GAP, ""), *fit([cell], widths[index])]
        lines.append(line)
    return lines


def _failures(
    runs: Sequence[ComparedRun],
    names: Sequence[str],
    canvas: TextCanvas,
) -> list[Line]:
    lines: list[Line] = []
    for run, name in zip(runs, names, strict=True):
        if run.last.ended is not None and run.status == "failed":
            reason = run.last.ended.message or "no reason is known"
            message = canvas.text(f"{name} failed: {reason}", 2 * canvas.width)
            lines += [[(part, "bad")] for part in wrap(message, canvas.width, 2)]
    return lines


def _style(label: str, cell: str) -> str:
    if label == "ended":
        if cell.startswith("done"):
            return "good"
        return "bad" if cell == "failed" else "warning"
    if label == "reward hacking" and cell:
        return "warning"
    return "strong" if label == "held-out exact, after" else ""
