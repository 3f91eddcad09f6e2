"""Single keys of the keyboard. Only the job in the foreground changes the settings of the terminal; the kernel would
stop any other one."""

from __future__ import annotations

import os
import re
import select
import termios
from contextlib import suppress
from typing import Any

_SEQUENCE = re.compile(rb"\x1b(?:\[[0-9;?<]*[@-~]|O.|[^\x1b])", re.DOTALL)
"""Arrows, function keys, and Alt with another key."""
_PARTIAL_SEQUENCE = re.compile(rb"\x1b(?:\[[0-9;?<]*|O)?\Z")
SEQUENCE_SECONDS = 0.05
"""Time in which the rest of a sequence arrives over a slow connection. After it, Esc is a key."""
ESCAPE = "\x1b"
UP, DOWN, PAGE_UP, PAGE_DOWN, HOME, END = "up", "down", "page up", "page down", "home", "end"
NAMED_KEYS = {
    b"\x1b[A": UP,
    b"\x1bOA": UP,
    b"\x1b[B": DOWN,
    b"\x1bOB": DOWN,
    b"\x1b[5~": PAGE_UP,
    b"\x1b[6~": PAGE_DOWN,
    b"\x1b[H": HOME,
    b"\x1bOH": HOME,
    b"\x1b[1~": HOME,
    b"\x1b[7~": HOME,
    b"\x1b[F": END,
    b"\x1bOF": END,
    b"\x1b[4~": END,
    b"\x1b[8~": END,
}
"""The keys that terminals send as a sequence and a screen uses. Any other sequence has no effect."""


def keys_in(data: bytes) -> list[str]:
    """Returns the keys in what a terminal sent: characters, and names of `NAMED_KEYS`."""
    keys = list[str]()
    end = 0
    for match in _SEQUENCE.finditer(data):
        keys += data[end : match.start()].decode("utf-8", "replace")
        if match[0] in NAMED_KEYS:
            keys.append(NAMED_KEYS[match[0]])
        end = match.end()
    return keys + list(data[end:].decode("utf-8", "replace"))


class Keyboard:
    """Reads keys as they are pressed, between `start` and `stop`. Ctrl-C and Ctrl-Z remain signals."""

    def __init__(self, descriptor: int | None) -> None:
        self.descriptor = descriptor
        if descriptor is not None and not os.isatty(descriptor):
            self.descriptor = None
        self._before: list[Any] | None = None
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)

    def start(self) -> None:
        """Switches off echo and line input. The first call stores the settings before it for `stop`."""
        if self.descriptor is None:
            return
        with suppress(termios.error, OSError):
            settings = termios.tcgetattr(self.descriptor)
            if self._before is None:
                self._before = [*settings[:6], list(settings[6])]
            settings[3] &= ~(termios.ICANON | termios.ECHO)
            settings[6][termios.VMIN] = 1
            settings[6][termios.VTIME] = 0
            termios.tcsetattr(self.descriptor, termios.TCSANOW, settings)

    def stop(self) -> None:
        """Restores the settings. Unread keys are dropped, so that the shell does not run them."""
        if self.descriptor is not None and self._before is not None:
            with suppress(termios.error, OSError):
                termios.tcflush(self.descriptor, termios.TCIFLUSH)
                termios.tcsetattr(self.descriptor, termios.TCSANOW, self._before)
        self._before = None

    def read(self, timeout: float) -> list[str]:
        """Returns the keys pressed since the last call; waits at most `timeout` seconds for the first one."""
        keyboard = self.descriptor if self._before is not None else None
        sources = [self._woken]
        if keyboard is not None:
            sources.append(keyboard)
        ready, _, _ = select.select(
            sources,
            [],
            [],
            timeout,
        )
        if self._woken in ready:
            os.read(self._woken, 4096)
        if keyboard is None or keyboard not in ready:
            return []
        data = self._read_bytes(keyboard)
        if _PARTIAL_SEQUENCE.search(data) and _is_ready(keyboard, SEQUENCE_SECONDS):
            data += self._read_bytes(keyboard)
        return keys_in(data)

    def _read_bytes(self, descriptor: int) -> bytes:
        data = b""
        with suppress(OSError):
            data = os.read(descriptor, 1024)
        if not data:
            # the terminal is closed or another job's: select would return at once, again and again
            self.descriptor = None
        return data

    def interrupt_read(self) -> None:
        """Ends a `read` that waits in another thread."""
        with suppress(OSError):
            os.write(self._waker, b"!")

    def close(self) -> None:
        """Restores the settings and closes the own descriptors."""
        self.stop()
        os.close(self._woken)
        os.close(self._waker)


def _is_ready(descriptor: int, timeout: float) -> bool:
    """Returns whether there is input within `timeout` seconds."""
    ready, _, _ = select.select(
        [descriptor],
        [],
        [],
        timeout,
    )
    return bool(ready)
