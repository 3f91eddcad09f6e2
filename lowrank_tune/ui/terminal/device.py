"""The terminal as a place to draw on: the alternate screen, only changed lines written, and nobody ever waits for
it."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from lowrank_tune.ui.terminal.text_layout import Line, to_ansi

ENTER = b"\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"  # another screen, no cursor, no line wrap
LEAVE = b"\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
WRITE_TIMEOUT = 0.2  # seconds that a slow line may take to swallow a frame before the rest of it is left out


class Terminal:
    """Draws on the terminal behind a descriptor, by a descriptor of its own that never blocks (Ctrl-S must not stop a
    run)."""

    def __init__(self, descriptor: int, environ: Mapping[str, str] = os.environ) -> None:
        self._control = os.dup(descriptor)
        try:
            self._out = os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError:  # a container that hides its terminal's name
            self._out = os.dup(descriptor)
        self.color = not environ.get("NO_COLOR")
        self.gone = False
        self._shown: list[Line] = []

    def size(self) -> tuple[int, int]:
        """Columns and lines, asked each time: it follows every resize."""
        with suppress(OSError):
            columns, lines = os.get_terminal_size(self._out)
            if columns > 0 and lines > 0:
                return columns, lines
        return 80, 24

    def foreground(self) -> bool:
        """Whether this job may draw and read keys now."""
        try:
            return os.tcgetpgrp(self._control) == os.getpgrp()
        except OSError:
            return False

    def enter(self) -> None:
        self._shown = []
        self._write(ENTER)

    def leave(self) -> None:
        self._write(LEAVE, 10 * WRITE_TIMEOUT)

    def show(self, lines: list[Line]) -> None:
        """Writes what differs from the last frame."""
        if len(lines) != len(self._shown):
            self._shown = []
        parts = [] if self._shown else ["\x1b[2J"]
        for row, line in enumerate(lines):
            if not self._shown or self._shown[row] != line:
                parts.append(f"\x1b[{row + 1};1H{to_ansi(line, self.color)}\x1b[K")
        self._shown = lines
        if parts and not self._write("".join(parts).encode("utf-8", "backslashreplace")):
            self._shown = []  # the next frame is a whole one

    def invalidate(self) -> None:
        """The next frame is a whole one: the screen may hold anything."""
        self._shown = []

    def close(self) -> None:
        os.close(self._out)
        os.close(self._control)

    def _write(self, data: bytes, timeout: float = WRITE_TIMEOUT) -> bool:
        """Whether all of it went out."""
        while data and not self.gone:
            try:
                data = data[os.write(self._out, data) :]
            except BlockingIOError:
                if not select.select([], [self._out], [], timeout)[1]:
                    return False
            except OSError:  # closed by its owner: the run goes on without it
                self.gone = True
        return not data


class Redirected:
    """While it lasts, what anyone writes to the terminal on descriptors 1 and 2 (CUDA, tokenizers, print) goes to a
    file instead."""

    def __init__(self, path: Path) -> None:
        self._saved: dict[int, int] = {}
        try:
            log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError:  # a screen that may tear is better than none
            return
        _flush()
        for descriptor in (1, 2):
            if os.isatty(descriptor):  # what a person sent to a file stays there
                self._saved[descriptor] = os.dup(descriptor)
                os.dup2(log, descriptor)
        os.close(log)

    def close(self, terminal_gone: bool = False) -> None:
        """Gives the descriptors back, unless the terminal behind them is lost."""
        _flush()
        for descriptor, saved in self._saved.items():
            if not terminal_gone:
                os.dup2(saved, descriptor)
            os.close(saved)
        self._saved.clear()


def _flush() -> None:
    for file in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            file.flush()


def can_show(file: TextIO, environ: Mapping[str, str], forced: bool = False) -> bool:
    """Whether a dashboard makes sense there: a terminal that can do more than lines, ours at the moment, and not a
    build server's."""
    if (
        environ.get("TERM", "dumb") in ("", "dumb")
        or environ.get("TTY_INTERACTIVE") == "0"
        or (environ.get("CI") and not forced)
    ):
        return False
    try:
        return file.isatty() and os.tcgetpgrp(file.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):
        return False


def ascii_only(file: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether Braille would come out as rubbish: by the encoding, by the locale, or on the bare Linux console."""
    locale = environ.get("LC_ALL") or environ.get("LC_CTYPE") or environ.get("LANG") or ""
    encoding = (getattr(file, "encoding", None) or "ascii").lower().replace("-", "")
    return encoding != "utf8" or locale in ("C", "POSIX") or environ.get("TERM") == "linux"
