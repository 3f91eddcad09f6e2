"""The overview of several runs: a line for each, and charts that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from heapq import nlargest

from rich.cells import cell_len

from lowrank_tune.ui.diagnostics import diagnose
from lowrank_tune.ui.formatting import clock, is_share, short_label
from lowrank_tune.ui.metrics import Point, Points
from lowrank_tune.ui.state import LogLine, State
from lowrank_tune.ui.terminal.chart_pane import FRONTIER, chart_names, chart_title_of, drawn_points, format_value
from lowrank_tune.ui.terminal.charts import Curve, chart, grid_size, smooth
from lowrank_tune.ui.terminal.header import shown_state, status
from lowrank_tune.ui.terminal.help_pane import help_pane
from lowrank_tune.ui.terminal.log_pane import log_entry
from lowrank_tune.ui.terminal.outliers import split_outliers
from lowrank_tune.ui.terminal.panes import SMOOTHINGS, View, heading
from lowrank_tune.ui.terminal.render import DIAGNOSIS_SIGNS, footer
from lowrank_tune.ui.terminal.text_layout import (
    Block,
    Line,
    column_widths,
    fit,
    pad,
    shorten,
    side_by_side,
    width_of,
)

RUN_STYLES = ("first", "second", "third", "chosen", "rejected", "fourth")
"""Colors of the runs; the seventh has that of the first. A curve has the number of its run at its end."""
MAX_NAME = 24
MIN_LOG_LINES = 3
LOG_SHARE = 5
"""The log has one of so many parts of the lines."""

Numbered = tuple[int, State]
"""A run with its number, 1 for the first one."""


def overview(
    states: Sequence[State],
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns exactly `height` lines of `width` cells."""
    # a pane that was opened elsewhere is not shown here
    view = replace(view, is_overview=True, pane="")
    runs = [(number, shown_state(state, view)) for number, state in enumerate(states, 1)]
    head = [_title(runs, width), *_run_lines(runs, view, width)]
    room = max(0, height - len(head) - 1)
    if view.help:
        body = help_pane(states[0], view, width, room)
    else:
        body = _body(runs, view, width, room)
    return [
        *pad(head, width, height - 1 - room),
        *pad(body, width, room),
        fit(footer(states[0], view, width), width),
    ]


def style_of(number: int) -> str:
    """Returns the color of a run."""
    return RUN_STYLES[(number - 1) % len(RUN_STYLES)]


def _title(runs: Sequence[Numbered], width: int) -> Line:
    running = sum(state.ended is None and state.ended_process is None for _, state in runs)
    note = f"  {running} of {len(runs)} running "
    line: Line = [(" lowrank-tune ", "key"), (f" {len(runs)} runs", "strong")]
    return [*fit(line, width - len(note)), (note, "quiet")]


def _run_lines(
    runs: Sequence[Numbered],
    view: View,
    width: int,
) -> Block:
    """Returns number, name, algorithm, status, step and newest value of each run, in columns."""
    rows = [_run_facts(state, view) for _, state in runs]
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: Block = []
    for (number, state), facts in zip(runs, rows, strict=True):
        _, status_style = status(state, view)
        line: Line = [(f" {number} ", style_of(number))]
        for column, (fact, cells) in enumerate(zip(facts, widths, strict=True)):
            # the last facts are the least important ones
            if width_of(line) + cells <= width:
                style = ("strong", "", status_style)[column] if column < 3 else ""
                line += [*fit([(fact, style)], cells), ("  ", "")]
        lines.append(line)
    return lines


def _run_facts(state: State, view: View) -> list[str]:
    run = state.started
    status_text, _ = status(state, view)
    if run is None:
        return ["run", "", status_text, "", "", ""]
    job = view.sanitize(run.algorithm, 12)
    if run.stages > 1:
        job = f"{job} {run.stage}/{run.stages}"
    percentage = 100 * state.step / max(1, state.steps)
    step = f"step {state.step}/{state.steps} ({percentage:.0f} %)"
    left = ""
    if state.seconds_left is not None and state.step < state.steps and state.ended_process is None:
        left = f"ETA {clock(state.seconds_left)}"
    name = shorten(view.sanitize(run.name, 60) or "run", MAX_NAME)
    return [name, job, shorten(status_text, 40), step, _newest_value(state, view), left]


def _newest_value(state: State, view: View) -> str:
    """Returns the last value of the most important metric."""
    for names in chart_names(state):
        value = state.last(names[0])
        if value is not None:
            return f"{view.sanitize(short_label(names[0]), 20)} {format_value(names[0], value)}"
    return ""


def _body(
    runs: Sequence[Numbered],
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the charts, the most severe diagnosis of each run, and the newest lines of all logs."""
    diagnoses = _diagnoses(runs, view, width)
    log_height = max(MIN_LOG_LINES, height // LOG_SHARE)
    grid = _charts(
        runs,
        view,
        width,
        height - len(diagnoses) - log_height,
    )
    log_height = height - len(diagnoses) - len(grid)
    log = _log(
        runs,
        view,
        width,
        log_height,
    )
    return [*grid, *diagnoses, *log]


def _charts(
    runs: Sequence[Numbered],
    view: View,
    width: int,
    height: int,
) -> Block:
    names = _common_metrics([state for _, state in runs])
    if not names:
        return [[(" no step yet: the curves begin with the first one", "quiet")]]
    columns, rows = grid_size(len(names), width, height)
    widths = column_widths(width, columns)
    lines: Block = []
    for start in range(0, min(len(names), columns * rows), columns):
        blocks = []
        for name, chart_width in zip(names[start : start + columns], widths, strict=False):
            blocks.append(
                _shared_chart(
                    runs,
                    name,
                    view,
                    chart_width,
                    height // rows,
                )
            )
        lines += side_by_side(blocks, widths[: len(blocks)], height // rows)
    return lines


def _common_metrics(states: Sequence[State]) -> list[str]:
    """Returns the metrics with a chart of their own, those of most runs first."""
    counts = dict[str, int]()
    for state in states:
        for names in chart_names(state):
            if len(names) == 1 and names != (FRONTIER,):
                counts[names[0]] = counts.get(names[0], 0) + 1
    # the sort is stable: the order of the charts remains
    return sorted(counts, key=counts.__getitem__, reverse=True)


def _shared_chart(
    runs: Sequence[Numbered],
    name: str,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns a title with the last value of each run, as far as there is room, and the chart."""
    title: Line = [(f" {chart_title_of((name,), view)}  ", "title")]
    if view.log_scale:
        title.append(("log  ", "quiet"))
    measured = dict[int, Points]()
    for number, state in runs:
        series = state.series.get(name) or state.series.get(f"eval_{name}")
        if series is None:
            continue
        measured[number] = drawn_points(name, series)
        value: Line = [(f"{number} ", "quiet"), (f"{format_value(name, series.last)}  ", style_of(number))]
        if width_of(title) + width_of(value) <= width + 2:
            title += value
    drawn, outliers = (measured, []) if view.log_scale else _without_outliers(measured)
    curves = []
    for number, points in drawn.items():
        sign = str(number)[-1]
        averaged = smooth(points, SMOOTHINGS[view.smoothing])
        curves.append(Curve(averaged, style_of(number), sign, end=sign))
    return [
        title,
        *chart(
            curves,
            width,
            height - 1,
            view.log_scale,
            view.ascii_only,
            share=is_share(name),
            outliers=outliers,
        ),
    ]


def _without_outliers(measured: Mapping[int, Points]) -> tuple[dict[int, Points], list[Point]]:
    """Returns the points of each run without its outliers, and the outliers. Those within the range of another run do
    not change the chart, so they remain."""
    bulk = dict[int, Points]()
    far = dict[int, Points]()
    for number, points in measured.items():
        bulk[number], far[number] = split_outliers(points)
    values = [y for points in bulk.values() for _, y in points]
    outliers = list[Point]()
    for number, points in far.items():
        if all(min(values) <= y <= max(values) for _, y in points):
            bulk[number] = measured[number]
        else:
            outliers += points
    return bulk, outliers


def _diagnoses(
    runs: Sequence[Numbered],
    view: View,
    width: int,
) -> Block:
    lines: Block = []
    for number, state in runs:
        worst = diagnose(state)[0]
        text = shorten(view.sanitize(worst.text), width - 7)
        lines.append(
            [
                (f" {number} ", style_of(number)),
                (f"{DIAGNOSIS_SIGNS[worst.level]} {text}", worst.level),
            ]
        )
    return lines


def _log(
    runs: Sequence[Numbered],
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the newest lines of all logs, each with the number of its run."""
    if height < MIN_LOG_LINES:
        return []
    lines = [heading("log", width, view)]
    entries = list[tuple[float, int, LogLine]]()
    for number, state in runs:
        entries += [(entry.at, -number, entry) for entry in list(state.log)[-height:]]
    for _, negative_number, entry in nlargest(height - 1, entries, key=_newest_first):
        number = -negative_number
        rows = log_entry(
            entry,
            view,
            width - 3,
            1,
        )
        lines += [[(f" {number} ", style_of(number)), *row] for row in rows]
    return lines[:height]


def _newest_first(entry: tuple[float, int, LogLine]) -> tuple[float, int]:
    at, negative_number, _ = entry
    return at, negative_number
