"""Limits on the CPU time of a part of a graded call, within the limit of the whole call (`worker.py`). Runs in the
worker process."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from lowrank_tune.processes.limits import ALARM_INTERVAL_SECONDS

T = TypeVar("T")
MIN_WATCH_SECONDS = 0.01


class TimeLimitExceeded(BaseException):
    """The part has used its time. Not an Exception, so that no `except Exception` of a library catches it."""


def _raise_time_limit(*_: object) -> None:
    raise TimeLimitExceeded


def time_limit(seconds: float, compute: Callable[[], T]) -> T | None:
    """Returns what `compute` returns, or None if it takes too long or too much memory.

    The part is limited in CPU time in user mode, by its own clock and signal; the clock of the whole call, which counts
    all CPU time, continues.
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
        # the alarm may have interrupted the `restore` above
        restore()
        return None


@contextlib.contextmanager
def interrupt_after(seconds: float, interrupt: Callable[[], None]) -> Iterator[threading.Event]:
    """Calls `interrupt` from another thread once this process has used `seconds` of CPU time in the body, and again
    until the body ends: for C libraries, which no signal handler interrupts. The event is set at the first call."""
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
