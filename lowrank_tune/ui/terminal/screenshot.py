"""Draws the dashboard as a picture: from recorded events, or from what a terminal shows.

python -m lowrank_tune.ui.terminal.screenshot EVENTS.jsonl OUT.svg [WIDTH HEIGHT [STEP]]
tmux capture-pane -e -p | python -m lowrank_tune.ui.terminal.screenshot - OUT.svg WIDTH HEIGHT
"""

from __future__ import annotations

import html
import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from lowrank_tune.events import Event, StepEnd
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.text_layout import rich_text
from lowrank_tune.ui.watch import read_events

DEFAULT_SIZE = (120, 40)

_FONT_FACE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
"""The font of rich, which is loaded from the network; a picture must not do that."""
_TEXT = re.compile(
    r'(<text class="dashboard-r\d+" x=")([\d.]+)(" y="[\d.]+" textLength=")([\d.]+)("[^>]*>)([^<]*)</text>'
)
_NO_BREAK_SPACE = "\xa0"


def screenshot(
    state: State,
    width: int,
    height: int,
) -> str:
    """Returns the screen as SVG, the same bytes for the same state."""
    screen = rich_text(
        render(
            state,
            View(),
            width,
            height,
        )
    )
    return _svg(screen, width, height)


def screenshot_of_terminal(
    captured: str,
    width: int,
    height: int,
) -> str:
    """Returns what a terminal shows as SVG, from its text with the escape codes of the colors."""
    # the codes of a row may also apply to the next one
    rows = Text.from_ansi(captured).split("\n", allow_blank=True)[:height]
    for row in rows:
        row.pad_right(width - row.cell_len)
    screen = Text("\n", no_wrap=True, end="").join(rows)
    return _svg(screen, width, height)


def _svg(
    screen: Text,
    width: int,
    height: int,
) -> str:
    console = Console(
        width=width,
        height=height,
        record=True,
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
        file=io.StringIO(),
        _environ={},
    )
    console.print(screen, soft_wrap=True)
    svg = console.export_svg(
        title="lowrank-tune",
        theme=MONOKAI,
        unique_id="dashboard",
    )
    svg = _FONT_FACE.sub("", svg).replace("Fira Code", "DejaVu Sans Mono, Menlo, Consolas")
    return _TEXT.sub(_without_blanks, svg)


def _without_blanks(match: re.Match[str]) -> str:
    """Moves the start of a text to its first letter, because not every viewer of SVG shows the blanks before it."""
    before, x, middle, length, after, text = match.groups()
    letters = html.unescape(text)
    stripped = letters.strip(_NO_BREAK_SPACE)
    if not stripped:
        return ""
    cell = float(length) / max(1, cell_len(letters))
    leading_blanks = len(letters) - len(letters.lstrip(_NO_BREAK_SPACE))
    start = float(x) + cell * leading_blanks
    stripped_length = cell * cell_len(stripped)
    escaped = html.escape(stripped, quote=False).replace(_NO_BREAK_SPACE, "&#160;")
    return f"{before}{start:.1f}{middle}{stripped_length:.1f}{after}{escaped}</text>"


def state_at_step(events: Iterable[Event], step: int | None) -> State:
    """Returns the state after a step; None means the last one."""
    state = State()
    for event in events:
        if step is not None and isinstance(event, StepEnd) and event.step > step:
            break
        state.apply(event)
    return state


def main(arguments: list[str]) -> None:
    """Writes the picture."""
    source, out, *numbers = arguments
    width, height, *step = [int(number) for number in numbers] or DEFAULT_SIZE
    if source == "-":
        svg = screenshot_of_terminal(sys.stdin.read(), width, height)
    else:
        state = state_at_step(read_events(Path(source)), step[0] if step else None)
        svg = screenshot(state, width, height)
    Path(out).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
