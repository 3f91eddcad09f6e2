"""The last column of the screen: in a terminal whose cursor stays on the last cell (xterm), and in a real tmux."""

from __future__ import annotations

import os
import pty
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_live_screen import Tmux, tmux  # noqa: F401  # a fixture

from lowrank_tune.ui.terminal.device import ENTER, LEAVE, Terminal
from lowrank_tune.ui.terminal.screenshot import screenshot_of_terminal
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


@pytest.mark.slow
def test_keys_scroll_and_show_stages_in_tmux(tmux: Tmux, tmp_path: Path) -> None:  # noqa: F811
    first = (ROOT / "tests" / "recorded" / "demo.jsonl").read_text()
    first = first.replace('"stage": 1, "stages": 1', '"stage": 1, "stages": 2')
    (tmp_path / "events.jsonl").write_text(first + (ROOT / "tests" / "recorded" / "dpo.jsonl").read_text())
    tmux.type(f"clear; {sys.executable} -m lowrank_tune watch .")
    tmux.until("stage 2 of 2: dpo")
    tmux("send-keys", "-l", "[")
    tmux.until("] to stage 2")
    assert "loss 0.402" in tmux.text()
    tmux("send-keys", "-l", "]l")
    tmux.until("── log ─")
    newest = tmux.text().splitlines()[5:23]
    tmux("send-keys", "PageUp", "Up")
    tmux.until("End: the newest")
    assert tmux.text().splitlines()[5:23] != newest
    tmux("send-keys", "Home")
    tmux.until("lines 1-")
    tmux("send-keys", "End")
    tmux.until(newest[-1].strip())
    assert tmux.text().splitlines()[5:23] == newest
    tmux("send-keys", "Escape")
    tmux.until("question 1 of 4")
    tmux("send-keys", "q")


def test_a_picture_of_a_terminal_has_its_text_and_colors() -> None:
    captured = "\x1b[2mquiet\n still\x1b[0m \x1b[96mlast\x1b[39m\n"
    svg = screenshot_of_terminal(captured, 12, 3)
    texts = {
        "".join(text.itertext()).strip() for text in ElementTree.fromstring(svg).iter() if text.tag.endswith("text")
    }
    assert {"quiet", "still", "last"} <= texts and "@font-face" not in svg
    # tmux writes the code of a style once, although it also applies to the next row
    classes = dict(re.findall(r'class="dashboard-(r\d+)"[^>]*>(\w+)<', svg))
    by_text = {text: name for name, text in classes.items()}
    assert set(by_text) >= {"still", "last"} and by_text["still"] != by_text["last"]
