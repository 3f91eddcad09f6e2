"""The screen of the chat: growing texts side by side in an emulated terminal, and the program in a pseudo-terminal and
in a pipe."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pyte
import pytest
from models import CPU, perturb, roles_over
from test_live_screen import ENVIRON, Emulator

from lowrank_tune.checkpoint import Snapshot, write_atomically
from lowrank_tune.config import BaseConfig
from lowrank_tune.model.adapters import CONFIG, WEIGHTS
from lowrank_tune.model.base import load_base, load_tokenizer
from lowrank_tune.model.base_source import BUILTIN_MODEL
from lowrank_tune.ui.terminal.chat_screen import escape_keep_newlines
from lowrank_tune.ui.terminal.columns import Columns
from lowrank_tune.ui.terminal.text_layout import wrap


class Terminal:
    """A terminal with a history of the lines that scrolled away."""

    def __init__(self, columns: int, lines: int) -> None:
        self.screen = pyte.HistoryScreen(columns, lines, history=10_000)
        self._stream = pyte.Stream(self.screen)
        self.size = (columns, lines)

    def write(self, text: str) -> None:
        self._stream.feed(text.replace("\n", "\r\n"))

    def lines(self) -> list[str]:
        gone = ["".join(line[column].data for column in range(self.size[0])) for line in self.screen.history.top]
        return [line.rstrip() for line in [*gone, *self.screen.display]]


def static(texts: list[str], width: int) -> list[str]:
    """Returns the rows of complete texts side by side."""
    blocks = [[row for part in text.split("\n") for row in (wrap(part, width, 9999) or [""])] for text in texts]
    rows = range(max(map(len, blocks)))
    left, right = ([block[row] if row < len(block) else "" for row in rows] for block in blocks)
    return [f"{a:{width}} | {b}".rstrip() for a, b in zip(left, right, strict=True)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lines", [6, 40])
def test_columns_show_both_texts_whole_however_they_grow(
    monkeypatch: pytest.MonkeyPatch, seed: int, lines: int
) -> None:
    """Also if they are longer than the screen: each line that scrolled away is in the history once, in order."""
    monkeypatch.setattr("lowrank_tune.ui.terminal.columns.FRAME_SECONDS", 0.0)
    stream, terminal = random.Random(seed), Terminal(50, lines)
    texts = [
        "".join(stream.choice(["word ", "a", "\n", "indeed, ", "x" * 30, " "]) for _ in range(stream.randrange(5, 90)))
        for _ in "ab"
    ]
    terminal.write("before\n")
    columns = Columns(terminal.write, lambda: terminal.size, [[("base", "")], [("tuned", "")]], False, "|")
    columns.draw()
    left = [0, 0]
    while any(at < len(text) for at, text in zip(left, texts, strict=True)):
        one = stream.randrange(2)
        step = stream.randrange(1, 12)
        columns.add(one, texts[one][left[one] : left[one] + step])
        left[one] += step
        if left[one] >= len(texts[one]):
            columns.end(one)
    for one in range(2):
        columns.end(one)
    terminal.write("after\n")
    shown = terminal.lines()
    width = (50 - 1 - 3) // 2
    expected = ["before", f"{'base':{width}} | tuned", *static(texts, width), "after"]
    assert shown[: len(expected)] == expected


def test_columns_after_a_change_of_the_width_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_tune.ui.terminal.columns.FRAME_SECONDS", 0.0)
    terminal, text = Terminal(120, 30), "seven words that stand beside each other here"
    columns = Columns(terminal.write, lambda: terminal.size, [[("base", "")], [("tuned", "")]], False, "|")
    columns.add(0, text)
    terminal.size = (50, 30)
    terminal.screen.resize(30, 50)
    columns.add(1, text)
    columns.end(0)
    columns.end(1)
    shown = "\n".join(terminal.lines())
    assert "\n".join(static([text, text], 23)) in shown


def test_model_text_cannot_control_the_terminal() -> None:
    hostile = "a\x1b[2J\x1b]0;title\x07b\rc\n\td\u202ee\x9bf"
    assert escape_keep_newlines(hostile) == "a\\x1b[2J\\x1b]0;title\\x07b\\rc\n    d\\u202ee\\x9bf"


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the tiny base that this kit did not train."""
    wanted = BaseConfig(model=BUILTIN_MODEL)
    roles = roles_over(load_base(wanted, load_tokenizer(wanted), CPU))
    perturb(roles, "policy", size=0.01)
    tensors, config = roles.adapter_tensors("policy"), roles.adapter_config("policy")
    return write_atomically(
        tmp_path_factory.mktemp("screen") / "adapter", Snapshot({WEIGHTS: tensors}, {CONFIG: config})
    )


def wait(seen: Emulator, pattern: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not re.search(pattern, seen.text()):
        assert time.monotonic() < end and seen.read(1.0), f"{pattern} never came:\n{seen.text()}"


def test_chat_at_a_terminal(adapter: Path, tmp_path: Path) -> None:
    """Answers are side by side if there is room, Ctrl-C stops an answer only, an error is shown and the chat continues,
    Ctrl-D ends it."""
    file = tmp_path / "talk.jsonl"
    seen = Emulator("-m", "lowrank_tune", "chat", str(adapter), "--max-new-tokens", "12", columns=120, lines=40)
    wait(seen, r"tuned will answer, greedy.*\n.*Ctrl-D ends *\nyou>")
    seen.press("/both How much is 7 + 8?\r")
    wait(seen, r"base +│ tuned *\n[^\n]*│[^\n]*\n(.*\n)*base: \[cut off after 12 tokens[^\n]*\n *tuned: \[.*\n *you>")
    seen.press("/nonsense\r")
    wait(seen, "there is no command /nonsense")
    seen.press("/set max_new_tokens 900\r/base What is 6 * 7?\r")
    wait(seen, r"base> \S+")
    seen.press("\x03")
    wait(seen, r"\[stopped after \d+ tokens?.*\n *you> *(\n|$)")
    seen.press("/undo\r")
    wait(seen, r"removed: What is 6 \* 7\?[^\n]*\n *you> *(\n|$)")
    seen.press("\x03")
    wait(seen, "Ctrl-D or /quit ends")
    seen.press(f"/save {file}\r")
    wait(seen, "nothing to save yet: every answer")
    seen.resize(80, 24)
    seen.press("/set max_new_tokens 3\r/both Why?\r")
    wait(seen, r"base> .*\n(.*\n)*tuned> .*\n(.*\n)*you>")
    seen.press("\x04")
    assert seen.finish() == 0
    assert not file.exists()


@pytest.mark.slow
def test_chat_in_a_pipe(adapter: Path, tmp_path: Path) -> None:
    """In a separate process: no escape codes, exit codes, a closed output pipe, and an interrupt."""
    words = [sys.executable, "-m", "lowrank_tune", "chat", str(adapter), "--max-new-tokens", "8"]
    typed = "How much is 7 + 8?\n/both Why?\n"
    done = subprocess.run(words, input=typed.encode(), capture_output=True, env=ENVIRON, timeout=300)
    assert done.returncode == 0 and b"\x1b" not in done.stdout + done.stderr and b"gemm_4bit" not in done.stderr
    assert b"\nbase: " in done.stdout and b"\ntuned: " in done.stdout and b"over tiny-tutor" not in done.stdout
    gone = subprocess.run(
        ["sh", "-c", f"yes 'Why?' | head -50 | {' '.join(words)} | head -1"],
        capture_output=True,
        env=ENVIRON,
        timeout=300,
    )
    assert b"Error" not in gone.stderr and gone.stdout.count(b"\n") == 1
    with subprocess.Popen(
        [*words[:-1], "900"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRON
    ) as child:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        child.stdin.write(b"/base How much is 7 + 8?\n")
        child.stdin.flush()
        child.stdout.read(4)
        child.send_signal(2)
        assert child.wait(60) == 130 and b"interrupted" in child.stderr.read()
        child.stdin.close()
    assert json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"] == BUILTIN_MODEL
