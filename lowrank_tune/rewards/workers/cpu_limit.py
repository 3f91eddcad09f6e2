"""A limit on the computing time of a part of a call, which a busy machine does not shorten."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SIGNAL_INTERVAL_SECONDS = 0.05


class CpuTimeExceeded(BaseException):
    """The part has used its computing time; no `except Exception` of a library takes it for its own."""


def _raise_exceeded(*_: object) -> None:
    raise CpuTimeExceeded


def limit_cpu_time(seconds: float, compute: Callable[[], T]) -> T:
    """What `compute` returns. Raises CpuTimeExceeded where this process needs more computing time for it; only in the
    main thread. The alarm clock of the whole call is another one, and goes on."""
    previous_handler = signal.getsignal(signal.SIGPROF)

    def restore() -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous_handler)

    try:
        try:
            signal.signal(signal.SIGPROF, _raise_exceeded)
            signal.setitimer(signal.ITIMER_PROF, seconds, SIGNAL_INTERVAL_SECONDS)
            return compute()
        finally:
            restore()
    except CpuTimeExceeded:
        restore()  # the signal may have come within the line above
        raise
