"""A picture of the dashboard from recorded events.

python -m lowrank_tune.ui.terminal.screenshot EVENTS OUT.svg [WIDTH HEIGHT [STEP]]
"""

from __future__ import annotations

import html
import io
import re
import sys
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.terminal_theme import MONOKAI

from lowrank_tune.events import Event, StepEnd
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.text_layout import rich_text
from lowrank_tune.ui.watch import read_events

_FONT_FACE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # rich's loads a font from the network; a picture must not

_TEXT = re.compile(
    r'(<text class="dashboard-r\d+" x=")([\d.]+)(" y="[\d.]+" textLength=")([\d.]+)("[^>]*>)([^<]*)</text>'
)


def screenshot(state: State, width: int, height: int) -> str:
    """The screen as SVG, the same bytes for the same state."""
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
    console.print(rich_text(render(state, View(), width, height)), soft_wrap=True)
    svg = console.export_svg(title="lowrank-tune", theme=MONOKAI, unique_id="dashboard")
    svg = _FONT_FACE.sub("", svg).replace("Fira Code", "DejaVu Sans Mono, Menlo, Consolas")
    return _TEXT.sub(_without_blanks, svg)


def _without_blanks(match: re.Match[str]) -> str:
    """Moves a text to where its first letter stands: not every program that shows SVG keeps the blanks before it."""
    before, x, middle, length, after, text = match.groups()
    letters = html.unescape(text)
    stripped = letters.strip("\xa0")
    if not stripped:
        return ""
    cell = float(length) / max(1, cell_len(letters))
    start = float(x) + cell * (len(letters) - len(letters.lstrip("\xa0")))
    escaped = html.escape(stripped, quote=False).replace("\xa0", "&#160;")
    return f"{before}{start:.1f}{middle}{cell * cell_len(stripped):.1f}{after}{escaped}</text>"


def state_at_step(events: list[Event], step: int | None) -> State:
    """The state after a step, or after everything."""
    state = State()
    for event in events:
        if step is not None and isinstance(event, StepEnd) and event.step > step:
            break
        state.apply(event)
    return state


def main(words: list[str]) -> None:
    if len(words) < 4:
        events, out, width, height, *step = [*words, "120", "40"][:4]
    else:
        events, out, width, height, *step = words
    state = state_at_step(list(read_events(Path(events))), int(step[0]) if step else None)
    Path(out).write_text(screenshot(state, int(width), int(height)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
