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


def render_several(
    states: Sequence[State],
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the dashboards of several runs, or that of the one that the view selects."""
    count = len(states)
    view = replace(view, runs=count)
    if count == 1 or 0 < view.run <= count:
        return render(states[max(0, view.run - 1)], view, width, height)
    side_width = (width - count + 1) // count
    is_side_by_side = (side_width >= MIN_SIDE_WIDTH) != view.other_layout
    is_too_small = width < MIN_WIDTH or height < MIN_HEIGHT
    if not is_side_by_side and not is_too_small:
        return overview(states, view, width, height)
    if side_width >= MIN_WIDTH:
        return _side_by_side(
            states,
            view,
            width,
            height,
        )
    lines: Block = []
    for index, state in enumerate(states):
        rest = height - len(lines)
        lines += render(
            state,
            view,
            width,
            rest // (count - index),
        )
    return lines


def _side_by_side(
    states: Sequence[State],
    view: View,
    width: int,
    height: int,
) -> Block:
    edges = len(states) - 1
    side_width = (width - edges) // len(states)
    widths = [side_width] * edges + [width - edges - side_width * edges]
    columns = []
    for state, column_width in zip(states, widths, strict=True):
        columns.append(
            render(
                state,
                view,
                column_width,
                height,
            )
        )
    return side_by_side(
        columns,
        widths,
        height,
        view.symbol("\u2502", "|"),
    )
