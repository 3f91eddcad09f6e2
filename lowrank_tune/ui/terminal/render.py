"""The dashboard as a pure function: `render(state, view, width, height)` returns the lines of the screen."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_tune.ui.diagnostics import diagnose
from lowrank_tune.ui.formatting import clock, short_label
from lowrank_tune.ui.metrics import SIDE_TITLES
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.chart_pane import chart_names, chart_pane, format_value
from lowrank_tune.ui.terminal.charts import grid_size
from lowrank_tune.ui.terminal.group_pane import group_pane
from lowrank_tune.ui.terminal.header import header, header_height, shown_state, status
from lowrank_tune.ui.terminal.help_pane import help_pane
from lowrank_tune.ui.terminal.log_pane import log_pane
from lowrank_tune.ui.terminal.panes import KEYS, OPTIONAL_KEYS, View, keys_of, labeled, labeled_value
from lowrank_tune.ui.terminal.sample_pane import sample_pane
from lowrank_tune.ui.terminal.scroll_panes import SCROLLED, answers_screen, log_screen
from lowrank_tune.ui.terminal.text_layout import (
    Block,
    Line,
    Piece,
    column_widths,
    fit,
    pad,
    side_by_side,
    width_of,
    wrap,
)

MIN_WIDTH = 60
MIN_HEIGHT = 15
"""Columns and lines below which there are no panes."""
MIN_TWO_PANE_WIDTH = 100
"""Columns from which on log and answers are beside each other."""
MIN_TWO_PANE_HEIGHT = 7
"""Lines from which on a narrow screen has both answers and log."""
MAX_PANES_HEIGHT = 18
MIN_PANES_HEIGHT = 4
MAX_SMALL_METRICS = 4
UP_DOWN = "\u2191\u2193"
FOOT_LINES = 1
PANES = {
    "g": group_pane,
    "l": log_screen,
    "a": answers_screen,
}
"""The panes that fill the screen below the header, each with the key that opens and closes it."""
DIAGNOSIS_SIGNS = {
    "bad": "!!",
    "warning": "! ",
    "good": "ok",
    "": "  ",
}


def body_height(view: View, height: int) -> int:
    """Returns the lines between header and footer."""
    return height - header_height(view, height) - FOOT_LINES


def render(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns exactly `height` lines of `width` cells."""
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        return pad(_small_screen(state, view, width), width, height)
    head = header(state, view, width, height)
    pane = PANES.get(view.pane, _body)
    if view.help:
        pane = help_pane
    rest = body_height(view, height)
    # the help lists the keys of the whole chain
    shown = state if view.help else shown_state(state, view)
    body = pane(shown, view, width, rest)
    keys = fit(footer(state, view, width), width)
    return [
        *pad(head, width, len(head)),
        *pad(body, width, rest),
        keys,
    ]


def _body(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the charts, below them the diagnoses, then log and answers."""
    diagnoses = _diagnoses(
        state,
        view,
        width,
        max(1, height // 9),
    )
    height -= len(diagnoses)
    grid: Block = []
    charts = chart_names(state)
    if charts:
        panes_height = max(MIN_PANES_HEIGHT, min(MAX_PANES_HEIGHT, height * 2 // 5))
        grid = _chart_grid(
            state,
            charts,
            view,
            width,
            height - panes_height,
        )
    return [
        *grid,
        *diagnoses,
        *_log_and_samples(
            state,
            view,
            width,
            height - len(grid),
        ),
    ]


def _chart_grid(
    state: State,
    charts: Sequence[Sequence[str]],
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns rows of charts, and a line with the last values of the charts that do not fit."""
    columns, rows = grid_size(len(charts), width, height)
    shown = charts[: columns * rows]
    left_out = charts[columns * rows :]
    if left_out:
        height -= 1
    widths = column_widths(width, columns)
    lines: Block = []
    for start in range(0, len(shown), columns):
        lines += _chart_row(
            state,
            shown[start : start + columns],
            view,
            widths,
            height // rows,
        )
    if left_out:
        lines.append(
            _last_values(
                state,
                left_out,
                view,
                width,
            )
        )
    return lines


def _chart_row(
    state: State,
    charts: Sequence[Sequence[str]],
    view: View,
    widths: Sequence[int],
    height: int,
) -> Block:
    blocks = []
    for names, width in zip(charts, widths, strict=False):
        blocks.append(
            chart_pane(
                state,
                names,
                view,
                width,
                height,
            )
        )
    return side_by_side(blocks, widths[: len(blocks)], height)


def _last_values(
    state: State,
    charts: Sequence[Sequence[str]],
    view: View,
    width: int,
) -> Line:
    """Returns a line with the last values of charts that a small screen does not show. Charts of several metrics are
    last, because a chart whose values do not fit is left out."""
    line: Line = [(" ", "")]
    for names in sorted(charts, key=len):
        values = _values_of_chart(state, names, view)
        if width_of(line) + width_of(values) <= width + 2:
            line += values
    return line


def _values_of_chart(
    state: State,
    names: Sequence[str],
    view: View,
) -> Line:
    values: Line = []
    if len(names) > 1:
        values.append((f"{SIDE_TITLES.get(names[0], 'rewards:')} ", "quiet"))
    for name in names:
        last = state.last(name)
        if last is None:
            continue
        label = view.sanitize(short_label(name), 20)
        values += labeled_value(f"{label} ", f"{format_value(name, last)}   ")
    return values


def _diagnoses(
    state: State,
    view: View,
    width: int,
    max_lines: int,
) -> Block:
    lines: Block = []
    for diagnosis in diagnose(state):
        rows = wrap(view.sanitize(diagnosis.text), width - 5, 2)
        label = f" {DIAGNOSIS_SIGNS[diagnosis.level]} "
        lines += labeled((label, diagnosis.level), rows, diagnosis.level)
    return lines[:max_lines]


def _log_and_samples(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the log and the answers: side by side, or the answers above the log on a narrow screen.

    Nothing is at the right of the answers, because a terminal may measure a character of theirs in another way.
    """
    if width >= MIN_TWO_PANE_WIDTH:
        left = (width - 1) * 9 // 20
        right = width - 1 - left
        panes = [
            log_pane(
                state,
                view,
                left,
                height,
            ),
            sample_pane(state, view, right, height),
        ]
        return side_by_side(panes, [left, right], height)
    samples_height = 2
    if state.answers or state.earlier or state.pairs:
        if height < MIN_TWO_PANE_HEIGHT:
            # the diagnoses also contain the most important warnings
            return sample_pane(state, view, width, height)
        samples_height = height * 3 // 5
    samples = pad(
        sample_pane(
            state,
            view,
            width,
            samples_height,
        ),
        width,
        samples_height,
    )
    return [
        *samples,
        *log_pane(
            state,
            view,
            width,
            height - samples_height,
        ),
    ]


def footer(
    state: State,
    view: View,
    width: int,
) -> Line:
    """Returns the keys with their labels. A narrow screen leaves out some of them."""
    if not view.keys:
        effect = "saves and quits" if view.owns_run else "closes this screen"
        return [(f" no keyboard input: Ctrl-C {effect}", "quiet")]
    keys = keys_of(state, view)
    for left_out in (*OPTIONAL_KEYS, ""):
        for is_wide in (True, False):
            line = _key_line(keys, view, is_wide)
            if width_of(line) <= width:
                return line
        keys = [key for key in keys if key != left_out]
    return line


def _key_line(
    keys: Sequence[str],
    view: View,
    is_wide: bool,
) -> Line:
    line: Line = [(" ", "")]
    for key in keys:
        label, _ = KEYS[key]
        if label:
            label = f" {label} "
        if is_wide:
            key = f" {key} "
            label = f"{label} " if label else ""
        line += [(key, "key"), (label, "")]
    if view.pane in SCROLLED and not view.help:
        line.append((f"{view.symbol(UP_DOWN, 'Up Down')} PgUp PgDn Home End", "quiet"))
    return line


def _small_screen(
    state: State,
    view: View,
    width: int,
) -> Block:
    """Returns plain lines for a screen that has no room for panes."""
    run = state.started
    status_text, status_style = status(state, view)
    name = view.sanitize(run.name) if run else "starting"
    rows = [(f"{name}: {status_text}", status_style)]
    job = state.job
    if job is not None:
        rows.append((f"{view.sanitize(job.description)} {job.done}/{job.total}", ""))
    if run is not None:
        steps = f"step {state.step}/{state.steps}"
        if state.seconds_left is not None and state.ended_process is None:
            steps = f"{steps}, ETA {clock(state.seconds_left)}"
        rows.append((steps, ""))
    rows += _small_metrics(state, view)
    for diagnosis in diagnose(state):
        for row in wrap(view.sanitize(diagnosis.text), width, 2):
            rows.append((row, diagnosis.level))
    for entry in reversed(state.warnings):
        rows.append((view.sanitize(entry.text), "warning"))
    return [[row] for row in rows]


def _small_metrics(state: State, view: View) -> list[Piece]:
    """Returns a row for each of the most important metrics that were measured."""
    names = [name for chart in chart_names(state) for name in chart]
    names = [name for name in [*names, "eval_loss"] if name in state.series]
    rows = []
    for name in names[:MAX_SMALL_METRICS]:
        label = view.sanitize(short_label(name), 40)
        rows.append((f"{label} {format_value(name, state.series[name].last)}", ""))
    return rows
