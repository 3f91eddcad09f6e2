"""Keys that change what a screen shows: panes, scrolling, stages of a chain, one of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.header import shown_state
from lowrank_tune.ui.terminal.keys import DOWN, END, ESCAPE, HOME, PAGE_DOWN, PAGE_UP, UP
from lowrank_tune.ui.terminal.panes import SMOOTHINGS, View
from lowrank_tune.ui.terminal.render import PANES, body_height
from lowrank_tune.ui.terminal.scroll_panes import scroll_limit
from lowrank_tune.ui.terminal.several import dashboard_sizes, selected_runs

SCROLL_KEYS = (UP, DOWN, PAGE_UP, PAGE_DOWN, HOME, END)
STAGE_KEYS = {
    "[": -1,
    "<": -1,
    "]": 1,
    ">": 1,
}
FIRST_LINE = 1 << 30
"""A scroll beyond the oldest line, which `settle` limits."""


def handle_key(
    view: View,
    key: str,
    now: float | None = None,
) -> View:
    """Returns the view after a key that changes the display only; the same view for any other key."""
    if key in PANES:
        pane = "" if view.pane == key and not view.help else key
        return replace(view, pane=pane, help=False, scroll=0, frozen=None)
    if key in SCROLL_KEYS:
        return _scrolled(view, key, now) if view.pane and not view.help else view
    if key in STAGE_KEYS:
        return replace(view, stage=_next_stage(view.stage, STAGE_KEYS[key]), scroll=0, frozen=None)
    if view.runs > 1 and key.isdecimal() and int(key) <= view.runs:
        return replace(view, run=int(key), pane="", help=False)
    return _with_key(view, key)


def _with_key(view: View, key: str) -> View:
    match key:
        case "+" | "=":
            return replace(view, smoothing=min(view.smoothing + 1, len(SMOOTHINGS) - 1))
        case "-":
            return replace(view, smoothing=max(view.smoothing - 1, 0))
        case "y":
            return replace(view, log_scale=not view.log_scale)
        case "n":
            return replace(view, sample=view.sample + 1)
        case "?" | "h":
            return replace(view, help=not view.help)
        case "o":
            return replace(view, other_layout=not view.other_layout)
        case _ if key == ESCAPE:
            return _closed(view)
    return view


def _next_stage(stage: int, move: int) -> int:
    """Returns the stage before or after one; neither leads from the first stage to the current one, which is 0."""
    if stage > 0:
        return max(1, stage + move)
    return min(0, stage + move)


def _closed(view: View) -> View:
    """Returns the view after Esc: without the open pane, else with all runs."""
    if view.pane or view.help:
        return replace(view, pane="", help=False, scroll=0, frozen=None)
    return replace(view, run=0)


def _scrolled(
    view: View,
    key: str,
    now: float | None,
) -> View:
    lines = {
        UP: view.scroll + 1,
        DOWN: view.scroll - 1,
        PAGE_UP: view.scroll + view.page_lines,
        PAGE_DOWN: view.scroll - view.page_lines,
        HOME: FIRST_LINE,
        END: 0,
    }
    scroll = max(0, lines[key])
    if scroll == 0:
        return replace(view, scroll=0, frozen=None)
    return replace(view, scroll=scroll, frozen=now if view.frozen is None else view.frozen)


def settle(
    states: Sequence[State],
    view: View,
    width: int,
    height: int,
) -> View:
    """Returns the view within what there is to show: an existing stage, and no scrolling beyond the oldest line."""
    newest = max((len(state.finished_stages) for state in states), default=0) + 1
    stage = view.stage
    if stage < 0:
        stage = max(1, newest + stage)
    if stage >= newest:
        stage = 0
    view = replace(view, stage=stage, runs=max(1, len(states)))
    shown = selected_runs(states, view)
    sizes = dashboard_sizes(len(shown), view, width, height)
    rooms = [body_height(view, lines) for _, lines in sizes]
    scroll = 0
    if view.scroll:
        limits = [
            scroll_limit(
                shown_state(state, view),
                view,
                columns,
                room,
            )
            for state, (columns, _), room in zip(shown, sizes, rooms, strict=False)
        ]
        scroll = min(view.scroll, max(limits, default=0))
    return replace(
        view,
        scroll=scroll,
        frozen=view.frozen if scroll else None,
        page_lines=max(1, min(rooms, default=height) - 2),
    )
