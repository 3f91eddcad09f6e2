"""The screen of a chat: answers as they are said, beside or below each other, and plain text where nobody looks on."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.terminal.columns import UNLIMITED, Columns
from lowrank_tune.ui.terminal.device import ascii_only
from lowrank_tune.ui.terminal.prompt import InteractiveInput, PipedInput
from lowrank_tune.ui.terminal.text_layout import STYLES, wrap

MIN_TWO_COLUMN_WIDTH = 100
"""Columns from which on two answers stand beside each other."""
VARIANT_STYLES = {"base": "second", "tuned": "first"}
"""A style for each variant."""


class AnswerView(Protocol):
    """Answers while they grow, by number. `together`: they may grow at once."""

    together: bool

    def add(self, number: int, piece: str) -> None: ...
    def end(self, number: int, facts: str, warns: bool) -> None: ...


def escape_keep_newlines(text: str) -> str:
    """A piece of text without anything that a terminal would obey; its line breaks stay."""
    return "\n".join(escape_control_chars(line) for line in text.replace("\t", "    ").split("\n"))


class ChatScreen:
    """Where the chat takes place. `live` only where a person types and sees: there are colors then, and an answer's
    facts below it.

    Elsewhere answers go to stdout without one escape byte, and whatever else there is to say goes to stderr.
    """

    def __init__(self, commands: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
        self.live = sys.stdin.isatty() and sys.stdout.isatty()
        self.smart = self.live and environ.get("TERM", "dumb") not in ("", "dumb")
        self.color = self.smart and not environ.get("NO_COLOR")
        self.bar = "|" if ascii_only(sys.stdout, environ) else "│"
        self.input: InteractiveInput | PipedInput = (
            InteractiveInput("you>", self._code("strong"), commands) if self.live else PipedInput()
        )

    def note(self, text: str, style: str = "quiet") -> None:
        """Something to know."""
        file = sys.stdout if self.live else sys.stderr
        for line in map(escape_control_chars, text.split("\n")):
            for row in (wrap(line, self.size()[0], UNLIMITED) or [""]) if self.live else [line]:
                file.write(f"{self._styled(self._encoded(row), style)}\n")
        file.flush()

    def answers(self, labels: Sequence[str]) -> AnswerView:
        """Room for an answer of each of these variants."""
        if self.smart and len(labels) > 1 and self.size()[0] >= MIN_TWO_COLUMN_WIDTH:
            return SideBySideView(self, labels)
        return StackedView(self, labels)

    def write(self, text: str) -> None:
        sys.stdout.write(self._encoded(text))
        sys.stdout.flush()

    @contextmanager
    def without_echo(self) -> Iterator[None]:
        """While an answer comes, typed keys do not show in it; they wait for the next question."""
        before = None
        if self.live:
            with suppress(termios.error, OSError, ValueError):
                before = termios.tcgetattr(sys.stdin)
                silent = [*before]
                silent[3] = int(silent[3]) & ~termios.ECHO
                termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
        try:
            yield
        finally:
            if before is not None:
                with suppress(termios.error, OSError, ValueError):
                    termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    def _encoded(self, text: str) -> str:
        encoding = sys.stdout.encoding or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _code(self, style: str) -> str:
        return STYLES[style][0] if self.color else ""

    def _styled(self, text: str, style: str) -> str:
        code = self._code(style)
        if code and text:
            return f"\x1b[{code}m{text}\x1b[0m"
        return text

    def label(self, variant: str) -> str:
        """A variant's name, before what it says."""
        return self._styled(f"{variant}>" if self.live else f"{variant}:", VARIANT_STYLES.get(variant, "strong"))

    def size(self) -> tuple[int, int]:
        """Columns and lines, asked each time: it follows every resize."""
        with suppress(OSError, ValueError):
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
            if columns > 0 and lines > 0:
                return columns, lines
        return 80, 24


class StackedView:
    """One answer after the other, written as it comes; the terminal breaks its lines, so a copy of them is the text as
    it was said."""

    together = False

    def __init__(self, screen: ChatScreen, labels: Sequence[str]) -> None:
        self.screen = screen
        self.labels = labels
        self._current = -1

    def add(self, number: int, piece: str) -> None:
        if number != self._current:
            self._current = number
            if self.screen.live or len(self.labels) > 1:
                self.screen.write(f"{self.screen.label(self.labels[number])} ")
        if piece:
            self.screen.write(escape_keep_newlines(piece))

    def end(self, number: int, facts: str, warns: bool) -> None:
        self.add(number, "")
        self.screen.write("\n")
        if self.screen.live or warns:
            self.screen.note(
                facts if self.screen.live else f"{self.labels[number]}: {facts}", "warning" if warns else "quiet"
            )


class SideBySideView:
    """Two answers at once, in columns."""

    together = True

    def __init__(self, screen: ChatScreen, labels: Sequence[str]) -> None:
        self.screen = screen
        self.labels = labels
        self._facts = dict[int, tuple[str, bool]]()
        titles = [[(label, VARIANT_STYLES.get(label, "strong"))] for label in labels]
        self.columns = Columns(screen.write, screen.size, titles, screen.color, screen.bar)
        self.columns.draw()

    def add(self, number: int, piece: str) -> None:
        self.columns.add(number, escape_keep_newlines(piece))

    def end(self, number: int, facts: str, warns: bool) -> None:
        self.columns.end(number)
        self._facts[number] = facts, warns
        if len(self._facts) == len(self.labels):
            for column, (text, alarming) in sorted(self._facts.items()):
                self.screen.note(f"{self.labels[column]}: {text}", "warning" if alarming else "quiet")
