"""Input of the chat: lines of a person, with the editing keys and the history of readline, or lines of a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from lowrank_tune.errors import UserError

try:
    import readline as _readline

    readline: Any = _readline
except ImportError:
    # a Python built without readline can still read lines
    readline = None

MULTILINE_MARKER = '"""'
"""A line that begins with it continues until a line that ends with it."""


class InteractiveInput:
    """Reads lines from a terminal. The history is kept until the program ends."""

    def __init__(
        self,
        label: str,
        code: str,
        commands: Sequence[str],
    ) -> None:
        self.first = f"{label} "
        if code and readline is not None:
            # the marks \x01 and \x02 exclude the escape codes from the width that readline computes
            self.first = f"\x01\x1b[{code}m\x02{label}\x01\x1b[0m\x02 "
        self.more = f"{'.' * len(label)} "
        self.commands = commands
        if readline is not None:
            readline.set_completer_delims(" ")
            readline.set_completer(self._complete)
            is_libedit = "libedit" in (readline.__doc__ or "")
            readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")

    def _complete(self, text: str, index: int) -> str | None:
        """Returns the command number `index` of those that begin with the text; readline calls it until None."""
        if not text:
            return None
        matches = [command for command in self.commands if command.startswith(text)]
        return matches[index] if index < len(matches) else None

    def read(self) -> str | None:
        """Returns a question or a command, None at the end.

        Raises KeyboardInterrupt after Ctrl-C, and UserError if the input is not UTF-8.
        """
        try:
            line = input(self.first)
            if not _is_multiline(line):
                return line
            return _read_multiline(line, self._read_more)
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise UserError("the input is not UTF-8") from error

    def _read_more(self) -> str | None:
        try:
            return input(self.more)
        except EOFError:
            return None


class PipedInput:
    """Reads one question for each line from a file or another program."""

    def __init__(self) -> None:
        self.line = 0

    def read(self) -> str | None:
        """Returns the next line that is not empty, None at the end. Raises UserError if a line is not UTF-8."""
        line = self._read_line()
        while line is not None and not line.strip():
            line = self._read_line()
        if line is None or not _is_multiline(line):
            return line
        return _read_multiline(line, self._read_line)

    def _read_line(self) -> str | None:
        raw = sys.stdin.buffer.readline()
        if not raw:
            return None
        self.line += 1
        # the first line may begin with a byte order mark
        encoding = "utf-8-sig" if self.line == 1 else "utf-8"
        try:
            return raw.decode(encoding).rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"line {self.line} is not UTF-8") from error


def _is_multiline(line: str) -> bool:
    return line.lstrip().startswith(MULTILINE_MARKER)


def _read_multiline(first: str, read: Callable[[], str | None]) -> str:
    """Returns the text from the opening marker to the closing one, or to the end of the input."""
    lines = [first.lstrip().removeprefix(MULTILINE_MARKER)]
    while not lines[-1].rstrip().endswith(MULTILINE_MARKER):
        line = read()
        if line is None:
            return "\n".join(lines).strip("\n")
        lines.append(line)
    lines[-1] = lines[-1].rstrip().removesuffix(MULTILINE_MARKER)
    return "\n".join(lines).strip("\n")
