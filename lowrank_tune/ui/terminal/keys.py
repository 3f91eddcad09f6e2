"""Single keys from the keyboard. The terminal's settings are touched only by the job in the foreground, for any other
would be stopped."""

from __future__ import annotations

import os
import re
import select
import termios
from contextlib import suppress
from typing import Any

_SEQUENCE = re.compile(rb"\x1b(?:\[[0-9;?<]*[@-~]|O.|[^\x1b])", re.DOTALL)  # arrows, function keys, Alt with a key
ESCAPE = "\x1b"


class Keyboard:
    """Reads keys as they are pressed, between `start` and `stop`. Ctrl-C and Ctrl-Z stay signals."""

    def __init__(self, descriptor: int | None) -> None:
        self.descriptor = descriptor if descriptor is not None and os.isatty(descriptor) else None
        self._before: list[Any] | None = None
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)

    def start(self) -> None:
        """No echo, no waiting for a line; what the settings were before is kept for `stop`."""
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
        """Gives the settings back. What was typed ahead is dropped, so that the shell does not run it."""
        if self.descriptor is not None and self._before is not None:
            with suppress(termios.error, OSError):
                termios.tcflush(self.descriptor, termios.TCIFLUSH)
                termios.tcsetattr(self.descriptor, termios.TCSANOW, self._before)
        self._before = None

    def read(self, timeout: float) -> str:
        """The keys pressed since the last call, after waiting for one at most so many seconds: Esc is one, a sequence
        is not."""
        descriptor = self.descriptor if self._before is not None else None
        ready, _, _ = select.select([self._woken] if descriptor is None else [self._woken, descriptor], [], [], timeout)
        if self._woken in ready:
            os.read(self._woken, 4096)
        if descriptor is None or descriptor not in ready:
            return ""
        try:
            data = os.read(descriptor, 1024)
        except OSError:
            data = b""
        if not data:  # hung up, or in the background: waiting for it would spin
            self.descriptor = None
        return _SEQUENCE.sub(b"", data).decode("utf-8", "replace")

    def interrupt_read(self) -> None:
        """Ends a `read` that waits in another thread."""
        with suppress(OSError):
            os.write(self._waker, b"!")

    def close(self) -> None:
        self.stop()
        os.close(self._woken)
        os.close(self._waker)
