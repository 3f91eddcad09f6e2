"""The log pane: warnings and log lines."""

from __future__ import annotations

from lowrank_tune.ui.formatting import clock
from lowrank_tune.ui.state import LogLine, State
from lowrank_tune.ui.terminal.panes import View, heading, labeled
from lowrank_tune.ui.terminal.text_layout import Line, wrap

WARNING_ROWS = 3
LOG_ROWS = 2
"""Lines that one entry may fill."""
LABEL_WIDTH = 8


def log_pane(
    state: State,
    view: View,
    width: int,
    height: int,
) -> list[Line]:
    """Returns the warnings, then the log, each with the newest entry first."""
    count = len(state.warnings)
    note = ""
    if count:
        note = "1 warning" if count == 1 else f"{count} warnings"
    lines = [heading("log", width, view, note)]
    for entry in reversed(state.warnings):
        if len(lines) >= height:
            break
        lines += _warning(entry, view, width)
    for entry in reversed(state.log):
        if len(lines) >= height:
            break
        lines += _log_entry(entry, view, width)
    return lines[:height]


def _warning(
    entry: LogLine,
    view: View,
    width: int,
) -> list[Line]:
    label = f"!{clock(entry.time):>6} "
    rows = _entry_rows(entry, view, width, WARNING_ROWS)
    return labeled((label, "warning"), rows, "warning")


def _log_entry(
    entry: LogLine,
    view: View,
    width: int,
) -> list[Line]:
    label = f" {clock(entry.time):>6} "
    rows = _entry_rows(entry, view, width, LOG_ROWS)
    return labeled((label, "quiet"), rows)


def _entry_rows(
    entry: LogLine,
    view: View,
    width: int,
    max_rows: int,
) -> list[str]:
    text = view.sanitize(entry.text, 3 * width)
    if entry.times > 1:
        text = f"{text} (x{entry.times})"
    return wrap(text, width - LABEL_WIDTH - 1, max_rows)
