"""Requests to a running training loop, from keys or signals. The loop reads them between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class TrainerControl:
    """Requests stay set until the loop has handled them, `pause` until it is set to False."""

    stop: bool = False
    save: bool = False
    evaluate: bool = False
    pause: bool = False


@contextmanager
def handle_signals(control: TrainerControl) -> Iterator[Callable[[bool], None]]:
    """Sets `control.stop` at SIGINT, SIGTERM or SIGHUP while the loop runs; the yielded function is called with
    True and False around it.

    A second SIGINT raises KeyboardInterrupt. A second SIGTERM or SIGHUP does nothing: a terminal that closes, or a
    batch system, may send several while the checkpoint is being written.

    Outside of the loop there is nothing to save: the first signal raises KeyboardInterrupt.
    """
    is_training = False

    def handle(number: int, frame: object) -> None:
        if control.stop and number != signal.SIGINT:
            return
        if control.stop or not is_training:
            raise KeyboardInterrupt
        control.stop = True

    def set_training(value: bool) -> None:
        nonlocal is_training
        is_training = value

    if threading.current_thread() is not threading.main_thread():
        # only the main thread may handle signals
        yield set_training
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield set_training
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
