"""A part of a judged call that may take only so long, within the alarm clock of the whole call
(`rewards/worker.py`)."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")
AGAIN_SECONDS = 0.05


class Halt(BaseException):
    """The part has taken its time; no `except Exception` of a library takes it for its own."""


def _halt(*_: object) -> None:
    raise Halt


def within(seconds: float, compute: Callable[[], Value]) -> Value | None:
    """What `compute` returns, or None where it took too long or too much memory. The clock of the whole call goes on
    behind it."""
    start, whole = time.monotonic(), signal.getsignal(signal.SIGALRM)
    left, again = signal.getitimer(signal.ITIMER_REAL)

    def restore() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, whole)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - start)), again)

    if left and left <= seconds:  # the clock of the whole call rings first
        return compute()
    try:
        try:
            signal.signal(signal.SIGALRM, _halt)
            signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
            return compute()
        finally:
            restore()
    except (Halt, MemoryError):
        restore()  # the alarm may have rung within the line above
        return None
