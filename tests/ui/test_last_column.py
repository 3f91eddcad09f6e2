"""The last column of the screen: in a terminal whose cursor stays on the last cell (xterm), and in a real tmux."""

from __future__ import annotations

import os
import pty
import re
import sys
from pathlib import Path

import pytest
from test_live_screen import Tmux, tmux  # noqa: F401  # a fixture

from lowrank_tune.ui.terminal.device import ENTER, LEAVE, Terminal
from lowrank_tune.ui.terminal.text_layout import Block

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|(.)", re.DOTALL)


def shown_by_xterm(written: str, width: int, height: int) -> list[str]:
    """Returns the rows after the output of a frame. With line wrap off, a written last cell leaves the cursor on it."""
    rows = [[" "] * width for _ in range(height)]
    row = column = 0
    for numbers, code, character in CODE.findall(written):
        if code == "H":
            row, column = (int(number) - 1 for number in numbers.split(";"))
        elif code == "K":
            start = 0 if numbers == "2" else column
            rows[row][start:] = [" "] * (width - start)
        elif code == "J":
            rows = [[" "] * width for _ in range(height)]
        elif character:
            rows[row][column] = character
            column = min(width - 1, column + 1)
    return ["".join(cells) for cells in rows]


def written_frames(*frames: Block) -> str:
    """Returns what a terminal receives for these frames."""
    master, slave = pty.openpty()
    screen = Terminal(slave, {})
    screen.enter()
    for frame in frames:
        screen.show(frame)
    screen.leave()
    screen.close()
    os.close(slave)
    written = b""
    try:
        while data := os.read(master, 65536):
            written += data
    except OSError:
        # Linux reports the closed terminal in this way
        pass
    os.close(master)
    return written.replace(ENTER, b"").replace(LEAVE, b"").decode()


def test_a_full_line_keeps_its_last_cell() -> None:
    first: Block = [[("0123456789", "title")], [("abcdefghi", ""), ("]", "quiet")]]
    second: Block = [first[0], [("short     ", "")]]
    assert shown_by_xterm(written_frames(first), 10, 2) == ["0123456789", "abcdefghi]"]
    assert shown_by_xterm(written_frames(first, second), 10, 2) == ["0123456789", "short     "]
    assert shown_by_xterm(written_frames(second, first), 10, 2) == ["0123456789", "abcdefghi]"]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (200, 50)])
def test_tmux_shows_the_last_column(tmux: Tmux, tmp_path: Path, width: int, height: int) -> None:  # noqa: F811
    (tmp_path / "events.jsonl").write_bytes((ROOT / "tests" / "recorded" / "demo.jsonl").read_bytes())
    tmux("resize-window", "-x", str(width), "-y", str(height))
    tmux.type(f"clear; {sys.executable} -m lowrank_tune watch .")
    tmux.until("help")
    rows = tmux.text().splitlines()
    assert max(len(row) for row in rows) == width
    last_steps = [row for row in rows if row.rstrip().endswith("96") and row.lstrip().startswith(("0", "1"))]
    assert last_steps and all(len(row) == width for row in last_steps)
