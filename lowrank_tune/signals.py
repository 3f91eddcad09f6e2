"""What a person asks of a running loop, by keys or by signals. The loop looks at it at step borders."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class TrainerControl:
    """Each request stays until the loop has met it; `pause` until it is taken back."""

    stop: bool = False
    save: bool = False
    evaluate: bool = False
    pause: bool = False


@contextmanager
def handle_signals(control: TrainerControl) -> Iterator[Callable[[bool], None]]:
    """While the loop runs (it is told so by what this yields), SIGINT, SIGTERM or SIGHUP asks it to stop; a second one
    stops at once.

    Outside of the loop there is nothing to save, and the first one raises KeyboardInterrupt.
    """
    is_training = False

    def handle(number: int, frame: object) -> None:
        if control.stop or not is_training:
            raise KeyboardInterrupt
        control.stop = True

    def set_training(value: bool) -> None:
        nonlocal is_training
        is_training = value

    if threading.current_thread() is not threading.main_thread():
        yield set_training  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield set_training
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
