"""What a person asks of a running loop, by keys or by signals. The loop looks at it at step borders."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Control:
    """Each wish stays until the loop has met it; `pause` until it is taken back."""

    stop: bool = False
    save: bool = False
    evaluate: bool = False
    pause: bool = False


@contextmanager
def asked_by_signals(control: Control) -> Iterator[Callable[[bool], None]]:
    """While the loop runs (it is told so by what this yields), SIGINT, SIGTERM or SIGHUP asks it to stop; a second one
    stops at once.

    Outside of the loop there is nothing to save, and the first one raises KeyboardInterrupt.
    """
    looping = False

    def handle(number: int, frame: object) -> None:
        if control.stop or not looping:
            raise KeyboardInterrupt
        control.stop = True

    def in_loop(now: bool) -> None:
        nonlocal looping
        looping = now

    if threading.current_thread() is not threading.main_thread():
        yield in_loop  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield in_loop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
