"""Several runs on one screen: side by side where it is wide enough, else in shared charts, each run with its number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.overview import overview
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.render import MIN_HEIGHT, MIN_WIDTH, render
from lowrank_tune.ui.terminal.text_layout import Block, side_by_side

MIN_SIDE_WIDTH = 79
"""Columns of a run from which on runs are side by side; with `o` `render.MIN_WIDTH` is enough."""


def selected_runs(states: Sequence[State], view: View) -> Sequence[State]:
    """Returns the run that the view selects, or all runs."""
    if 0 < view.run <= len(states):
        return states[view.run - 1 : view.run]
    return states


def dashboard_sizes(
    count: int,
    view: View,
    width: int,
    height: int,
) -> list[tuple[int, int]]:
    """Returns columns and lines of the dashboard of each of `count` runs, an empty list if they share their charts."""
    if count == 1:
        return [(width, height)]
    side_width = (width - count + 1) // count
    is_side_by_side = (side_width >= MIN_SIDE_WIDTH) != view.other_layout
    is_too_small = width < MIN_WIDTH or height < MIN_HEIGHT
    if not is_side_by_side and not is_too_small:
        return []
    if side_width >= MIN_WIDTH:
        last_width = width - (count - 1) * (side_width + 1)
        return [*[(side_width, height)] * (count - 1), (last_width, height)]
    # one below the other
    return [(width, (height + index) // count) for index in range(count)]


def render_several(
    states: Sequence[State],
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the dashboards of several runs, or that of the one that the view selects."""
    view = replace(view, runs=len(states))
    shown = selected_runs(states, view)
    sizes = dashboard_sizes(len(shown), view, width, height)
    if not sizes:
        return overview(states, view, width, height)
    blocks = [render(state, view, *size) for state, size in zip(shown, sizes, strict=True)]
    widths = [columns for columns, _ in sizes]
    if widths[0] < width:
        edge = view.symbol("\u2502", "|")
        return side_by_side(blocks, widths, height, edge)
    return [line for block in blocks for line in block]
