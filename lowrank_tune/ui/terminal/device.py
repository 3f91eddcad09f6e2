"""The terminal as a device: the alternate screen, frames that write changed lines only, and writes that never block the
run."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from lowrank_tune.ui.cell_output import in_cell
from lowrank_tune.ui.terminal.text_layout import Block, to_ansi

ENTER = b"\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
"""Alternate screen, hidden cursor, no line wrap, cleared."""
LEAVE = b"\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
CLEAR = "\x1b[2J"
WRITE_TIMEOUT = 0.2
"""Seconds after which the rest of a frame is left out because the terminal does not accept it."""
DEFAULT_SIZE = (80, 24)


def terminal_size(descriptor: int) -> tuple[int, int]:
    """Returns the current columns and lines of a terminal, `DEFAULT_SIZE` if they are unknown."""
    with suppress(OSError):
        columns, lines = os.get_terminal_size(descriptor)
        if columns > 0 and lines > 0:
            return columns, lines
    return DEFAULT_SIZE


class Terminal:
    """Draws on the terminal of a descriptor, by a descriptor of its own that never blocks, so that Ctrl-S does not stop
    a run."""

    def __init__(self, descriptor: int, environ: Mapping[str, str] = os.environ) -> None:
        self._control = os.dup(descriptor)
        try:
            self._out = os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError:
            # some containers hide the name of the terminal
            self._out = os.dup(descriptor)
        self.color = not environ.get("NO_COLOR")
        self.gone = False
        self._shown: Block = []

    def size(self) -> tuple[int, int]:
        """Returns columns and lines, read at each call, so that each resize is seen."""
        return terminal_size(self._out)

    def foreground(self) -> bool:
        """Returns whether this job may draw and read keys now."""
        try:
            return os.tcgetpgrp(self._control) == os.getpgrp()
        except OSError:
            return False

    def enter(self) -> None:
        """Switches to the alternate screen."""
        self.invalidate()
        self._write(ENTER)

    def leave(self) -> None:
        """Switches back to the normal screen."""
        self._write(LEAVE, 10 * WRITE_TIMEOUT)

    def show(self, lines: Block) -> None:
        """Writes the lines that differ from the last frame.

        A row is cleared before it is written: after the last cell the cursor of xterm and tmux stays on that cell, so
        that clearing to the end of the line would remove it.
        """
        if len(lines) != len(self._shown):
            self.invalidate()
        is_whole = not self._shown
        parts = [CLEAR] if is_whole else []
        for row, line in enumerate(lines):
            if is_whole or self._shown[row] != line:
                parts.append(f"\x1b[{row + 1};1H\x1b[K{to_ansi(line, self.color)}")
        self._shown = lines
        frame = "".join(parts).encode("utf-8", "backslashreplace")
        if not self._write(frame):
            self.invalidate()

    def invalidate(self) -> None:
        """Makes the next frame a complete one, because the content of the screen is unknown."""
        self._shown = []

    def close(self) -> None:
        """Closes the own descriptors."""
        os.close(self._out)
        os.close(self._control)

    def _write(self, data: bytes, timeout: float = WRITE_TIMEOUT) -> bool:
        """Writes data; returns whether all of it was written."""
        while data and not self.gone:
            try:
                written = os.write(self._out, data)
                data = data[written:]
            except BlockingIOError:
                _, writable, _ = select.select(
                    [],
                    [self._out],
                    [],
                    timeout,
                )
                if not writable:
                    return False
            except OSError:
                # the terminal was closed: the run continues without it
                self.gone = True
        return not data


class Redirected:
    """Redirects writes to the terminal on descriptors 1 and 2 (CUDA, tokenizers, print) to a file, until `close`."""

    def __init__(self, path: Path) -> None:
        self._saved: dict[int, int] = {}
        try:
            log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError:
            # without the file, such output may damage a frame, but the dashboard still works
            return
        _flush()
        for descriptor in (1, 2):
            # a descriptor that is already redirected to a file keeps that file
            if os.isatty(descriptor):
                self._saved[descriptor] = os.dup(descriptor)
                os.dup2(log, descriptor)
        os.close(log)

    def close(self, terminal_gone: bool = False) -> None:
        """Restores the descriptors, unless their terminal was closed."""
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


def can_show(
    file: TextIO,
    environ: Mapping[str, str],
    forced: bool = False,
) -> bool:
    """Returns whether a file is a terminal that can show the dashboard: one with cursor movement, whose foreground job
    is this process, and not that of a build server or of a cell of a notebook, unless forced."""
    if environ.get("TERM", "dumb") in ("", "dumb"):
        return False
    if environ.get("TTY_INTERACTIVE") == "0":
        return False
    if in_cell(environ) and not forced:
        return False
    if environ.get("CI") and not forced:
        return False
    try:
        return file.isatty() and os.tcgetpgrp(file.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):
        return False


def ascii_only(file: TextIO, environ: Mapping[str, str]) -> bool:
    """Returns whether Braille characters cannot be shown: because of the encoding, the locale, or the Linux console."""
    if environ.get("TERM") == "linux":
        return True
    locale = environ.get("LC_ALL") or environ.get("LC_CTYPE") or environ.get("LANG")
    if locale in ("C", "POSIX"):
        return True
    encoding = getattr(file, "encoding", None) or "ascii"
    return encoding.lower().replace("-", "") != "utf8"
