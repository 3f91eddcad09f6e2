"""Limits on the CPU time of a part of a judged call, within that of the whole call (`rewards/worker.py`)."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
ALARM_INTERVAL_SECONDS = 0.05
MIN_WATCH_SECONDS = 0.01


class TimeLimitExceeded(BaseException):
    """The part has taken its time; no `except Exception` of a library takes it for its own."""


def _raise_time_limit(*_: object) -> None:
    raise TimeLimitExceeded


def time_limit(seconds: float, compute: Callable[[], T]) -> T | None:
    """What `compute` returns, or None where it took too long or too much memory.

    The clock of the part counts CPU time in user mode, and that of the whole call, which goes on behind it, all of it:
    so they are two clocks, with signals of their own.
    """
    previous_handler = signal.getsignal(signal.SIGVTALRM)

    def restore() -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous_handler)

    try:
        try:
            signal.signal(signal.SIGVTALRM, _raise_time_limit)
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, ALARM_INTERVAL_SECONDS)
            return compute()
        finally:
            restore()
    except (TimeLimitExceeded, MemoryError):
        restore()  # the alarm may have rung within the line above
        return None


@contextlib.contextmanager
def interrupt_after(seconds: float, interrupt: Callable[[], None]) -> Iterator[threading.Event]:
    """Calls `interrupt` from another thread once this process has used so much CPU time in the body, and again until
    the body ends: for libraries in C, which no signal handler stops. The event is set from the first call on."""
    end = time.process_time() + seconds
    interrupted = threading.Event()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(max(MIN_WATCH_SECONDS, end - time.process_time())):
            if time.process_time() >= end:
                interrupted.set()
                interrupt()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield interrupted
    finally:
        done.set()
        watcher.join()
