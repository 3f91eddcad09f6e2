"""Questions from a person: with the keys and the history that readline gives, or line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lowrank_tune.errors import UserError

try:
    import readline as _readline

    readline: Any = _readline
except ImportError:  # a Python built without it still reads lines
    readline = None

MULTILINE_MARKER = '"""'
"""A line that begins with this goes on until a line ends with it."""


class InteractiveInput:
    """At a terminal. The history lives as long as the program."""

    def __init__(self, label: str, code: str, commands: Sequence[str]) -> None:
        # Readline must know which letters take no room.
        if code and readline is not None:
            coded = f"\x01\x1b[{code}m\x02{label}\x01\x1b[0m\x02 "
        else:
            coded = f"{label} "
        self.first = coded
        self.more = f"{'.' * len(label)} "
        if readline is not None:
            readline.set_completer_delims(" ")
            readline.set_completer(
                lambda text, state: _nth([command for command in commands if text and command.startswith(text)], state)
            )
            readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")

    def read(self) -> str | None:
        """A question or a command; None at the end. Raises KeyboardInterrupt, and UserError for what is no text."""
        try:
            line = input(self.first)
            if not line.lstrip().startswith(MULTILINE_MARKER):
                return line
            return _read_multiline(line, lambda: input(self.more))
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise UserError("this is not UTF-8, so it is no text") from error


class PipedInput:
    """From a file or another program: one question a line."""

    def __init__(self) -> None:
        self.line = 0

    def read(self) -> str | None:
        """The next line that is not empty; None at the end. Raises UserError for what is no text."""
        line: str | None = ""
        while line is not None and not line.strip():
            line = self._line()
        if line is None or not line.lstrip().startswith(MULTILINE_MARKER):
            return line
        return _read_multiline(line, self._line)

    def _line(self) -> str | None:
        raw = sys.stdin.buffer.readline()
        if not raw:
            return None
        self.line += 1
        try:
            return raw.decode("utf-8-sig" if self.line == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"line {self.line} is not UTF-8, so it is no text") from error


def _read_multiline(first: str, read: Any) -> str:
    """All lines from the opening quotes to the closing ones, or to the end."""
    lines = [first.lstrip()[len(MULTILINE_MARKER) :]]
    while not lines[-1].rstrip().endswith(MULTILINE_MARKER):
        try:
            line = read()
        except EOFError:
            line = None
        if line is None:
            return "\n".join(lines).strip("\n")
        lines.append(line)
    lines[-1] = lines[-1].rstrip()[: -len(MULTILINE_MARKER)]
    return "\n".join(lines).strip("\n")


def _nth(matches: Sequence[str], index: int) -> str | None:
    with suppress(IndexError):
        return matches[index]
    return None
