"""A part of a judged call that may take only so long, within the alarm clock of the whole call
(`rewards/worker.py`)."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
ALARM_INTERVAL_SECONDS = 0.05


class TimeLimitExceeded(BaseException):
    """The part has taken its time; no `except Exception` of a library takes it for its own."""


def _raise_time_limit(*_: object) -> None:
    raise TimeLimitExceeded


def time_limit(seconds: float, compute: Callable[[], T]) -> T | None:
    """What `compute` returns, or None where it took too long or too much memory. The clock of the whole call goes on
    behind it."""
    start, previous_handler = time.monotonic(), signal.getsignal(signal.SIGALRM)
    remaining, interval = signal.getitimer(signal.ITIMER_REAL)

    def restore() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, remaining - (time.monotonic() - start)), interval)

    if remaining and remaining <= seconds:  # the clock of the whole call rings first
        return compute()
    try:
        try:
            signal.signal(signal.SIGALRM, _raise_time_limit)
            signal.setitimer(signal.ITIMER_REAL, seconds, ALARM_INTERVAL_SECONDS)
            return compute()
        finally:
            restore()
    except (TimeLimitExceeded, MemoryError):
        restore()  # the alarm may have rung within the line above
        return None
