"""The screen of a chat: answers appear while they are generated, side by side or one after the other. In a pipe they
are plain text."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lowrank_tune.ui import encodable, escape_control_chars, escape_lines
from lowrank_tune.ui.terminal.columns import UNLIMITED, Columns
from lowrank_tune.ui.terminal.device import DEFAULT_SIZE, ascii_only, terminal_size
from lowrank_tune.ui.terminal.prompt import InteractiveInput, PipedInput
from lowrank_tune.ui.terminal.text_layout import STYLES, with_code, wrap

MIN_TWO_COLUMN_WIDTH = 100
"""Columns from which on two answers are side by side."""
VARIANT_STYLES = {"base": "second", "tuned": "first"}
"""A style for each variant."""


def escape_keep_newlines(text: str) -> str:
    """Returns text without control characters, except for its line breaks; a tab becomes four blanks."""
    return escape_lines(text.replace("\t", "    "))


class ChatScreen:
    """Input and output of a chat.

    `live` if a person types and reads at a terminal: then there are colors, and facts below each answer. Otherwise
    answers go to stdout without any escape code, and all other text goes to stderr.
    """

    def __init__(self, commands: Sequence[str]) -> None:
        self.live = sys.stdin.isatty() and sys.stdout.isatty()
        self.smart = self.live and os.environ.get("TERM", "dumb") not in ("", "dumb")
        self.color = self.smart and not os.environ.get("NO_COLOR")
        self.bar = "|" if ascii_only(sys.stdout, os.environ) else "│"
        self.input: InteractiveInput | PipedInput = PipedInput()
        if self.live:
            self.input = InteractiveInput("you>", self._code("strong"), commands)

    def note(self, text: str, style: str = "quiet") -> None:
        """Prints a message of the program."""
        file = sys.stdout if self.live else sys.stderr
        for line in text.split("\n"):
            for row in self._rows(escape_control_chars(line)):
                file.write(f"{self._styled(encodable(row, sys.stdout), style)}\n")
        file.flush()

    def _rows(self, line: str) -> list[str]:
        """Returns a line wrapped to the terminal; in a pipe the line itself."""
        if not self.live:
            return [line]
        columns, _ = self.size()
        return wrap(line, columns, UNLIMITED) or [""]

    def answers(self, labels: Sequence[str]) -> AnswerView:
        """Returns a view for one answer of each of these variants."""
        columns, _ = self.size()
        if self.smart and len(labels) > 1 and columns >= MIN_TWO_COLUMN_WIDTH:
            return SideBySideView(self, labels)
        return StackedView(self, labels)

    def write(self, text: str) -> None:
        """Writes text that contains no unsafe characters."""
        sys.stdout.write(encodable(text, sys.stdout))
        sys.stdout.flush()

    @contextmanager
    def without_echo(self) -> Iterator[None]:
        """Within it, typed keys do not appear in the answer; they are input for the next question."""
        before = self._switch_off_echo() if self.live else None
        try:
            yield
        finally:
            if before is not None:
                with suppress(termios.error, OSError, ValueError):
                    termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    def _switch_off_echo(self) -> list[Any] | None:
        """Returns the settings of the terminal before the change, None if they are unknown."""
        before = None
        with suppress(termios.error, OSError, ValueError):
            before = termios.tcgetattr(sys.stdin)
            settings = [*before]
            settings[3] = int(settings[3]) & ~termios.ECHO
            termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)
        return before

    def _code(self, style: str) -> str:
        return STYLES[style].color if self.color else ""

    def _styled(self, text: str, style: str) -> str:
        return with_code(text, self._code(style))

    def label(self, variant: str) -> str:
        """Returns the name of a variant, as it is before an answer."""
        mark = ">" if self.live else ":"
        return self._styled(f"{variant}{mark}", _style_of(variant))

    def size(self) -> tuple[int, int]:
        """Returns columns and lines, read at each call, so that each resize is seen."""
        with suppress(OSError, ValueError):
            return terminal_size(sys.stdout.fileno())
        return DEFAULT_SIZE


def _style_of(variant: str) -> str:
    return VARIANT_STYLES.get(variant, "strong")


def _note_style(warns: bool) -> str:
    return "warning" if warns else "quiet"


@dataclass
class StackedView:
    """One answer after the other, written while it is generated. The terminal breaks the lines, so that copied text has
    the line breaks of the answer only."""

    screen: ChatScreen
    labels: Sequence[str]
    _current: int = -1
    together = False

    def add(self, number: int, piece: str) -> None:
        """Writes a piece of an answer, the first one after the name of its variant."""
        if number != self._current:
            self._current = number
            if self.screen.live or len(self.labels) > 1:
                self.screen.write(f"{self.screen.label(self.labels[number])} ")
        if piece:
            self.screen.write(escape_keep_newlines(piece))

    def end(
        self,
        number: int,
        facts: str,
        warns: bool,
    ) -> None:
        """Ends the line of an answer. Its facts follow on a live screen, elsewhere only if they contain a warning."""
        self.add(number, "")
        self.screen.write("\n")
        if self.screen.live:
            self.screen.note(facts, _note_style(warns))
        elif warns:
            self.screen.note(f"{self.labels[number]}: {facts}", "warning")


@dataclass
class SideBySideView:
    """Two answers at the same time, in columns."""

    screen: ChatScreen
    labels: Sequence[str]
    together = True

    def __post_init__(self) -> None:
        self._facts = dict[int, tuple[str, bool]]()
        titles = [[(label, _style_of(label))] for label in self.labels]
        self.columns = Columns(
            self.screen.write,
            self.screen.size,
            titles,
            self.screen.color,
            self.screen.bar,
        )
        self.columns.draw()

    def add(self, number: int, piece: str) -> None:
        """Appends a piece to the column of an answer."""
        self.columns.add(number, escape_keep_newlines(piece))

    def end(
        self,
        number: int,
        facts: str,
        warns: bool,
    ) -> None:
        """Ends an answer. The facts of all answers follow the last one."""
        self.columns.end(number)
        self._facts[number] = facts, warns
        if len(self._facts) < len(self.labels):
            return
        for column, (text, is_warning) in sorted(self._facts.items()):
            self.screen.note(f"{self.labels[column]}: {text}", _note_style(is_warning))


AnswerView = StackedView | SideBySideView
"""Shows answers while they grow, by their number. With `together`, several may grow at the same time."""
