"""The log pane: warnings and log lines."""

from __future__ import annotations

from lowrank_tune.ui.formatting import clock
from lowrank_tune.ui.state import LogLine, State
from lowrank_tune.ui.terminal.panes import View, heading, labeled
from lowrank_tune.ui.terminal.text_layout import Block, wrap

WARNING_ROWS = 3
LOG_ROWS = 2
"""Lines that one entry may fill."""
LABEL_WIDTH = 8


def log_pane(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the warnings, then the log, each with the newest entry first."""
    count = len(state.warnings)
    note = ""
    if count:
        note = "1 warning" if count == 1 else f"{count} warnings"
    lines = [heading("log", width, view, note)]
    for index, entry in enumerate([*reversed(state.warnings), *reversed(state.log)]):
        if len(lines) >= height:
            break
        lines += _entry(
            entry,
            view,
            width,
            is_warning=index < count,
        )
    return lines[:height]


def _entry(
    entry: LogLine,
    view: View,
    width: int,
    is_warning: bool,
) -> Block:
    text = view.sanitize(entry.text, 3 * width)
    if entry.times > 1:
        text = f"{text} (x{entry.times})"
    text_width = width - LABEL_WIDTH - 1
    stamp = f"{clock(entry.time):>6} "
    if is_warning:
        return labeled((f"!{stamp}", "warning"), wrap(text, text_width, WARNING_ROWS), "warning")
    return labeled((f" {stamp}", "quiet"), wrap(text, text_width, LOG_ROWS))
