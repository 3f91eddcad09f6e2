"""The log pane: warnings and log lines."""

from __future__ import annotations

from lowrank_tune.ui.formatting import clock, plural
from lowrank_tune.ui.state import LogLine, State
from lowrank_tune.ui.terminal.panes import View, heading, labeled
from lowrank_tune.ui.terminal.text_layout import Block, wrap

WARNING_ROWS = 3
LOG_ROWS = 2
"""Lines that one entry may fill."""


def log_pane(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the warnings since the start of the training, then all other lines, each with the newest first."""
    count = len(state.warnings)
    note = plural(count, "warning") if count else ""
    lines = [heading("log", width, view, note)]
    first = [entry for entry in reversed(state.warnings) if _is_urgent(state, entry)]
    others = [entry for entry in list(state.log)[-height:] if not (entry.is_warning and _is_urgent(state, entry))]
    for entry in [*first, *reversed(others)]:
        if len(lines) >= height:
            break
        lines += log_entry(
            entry,
            view,
            width,
            WARNING_ROWS if entry.is_warning else LOG_ROWS,
        )
    return lines[:height]


def _is_urgent(state: State, entry: LogLine) -> bool:
    """Returns whether a warning is about the training. One about the data or the base is a line like any other."""
    return state.started is not None and entry.at >= state.started.time


def log_entry(
    entry: LogLine,
    view: View,
    width: int,
    max_rows: int,
) -> Block:
    """Returns a line of the log with its time, wrapped to at most `max_rows` lines."""
    text = view.sanitize(entry.text, (max_rows + 1) * width)
    if entry.times > 1:
        text = f"{text} (x{entry.times})"
    sign = "!" if entry.is_warning else " "
    label = f"{sign}{clock(entry.time):>6} "
    rows = wrap(text, width - len(label) - 1, max_rows)
    if entry.is_warning:
        return labeled((label, "warning"), rows, "warning")
    return labeled((label, "quiet"), rows)
