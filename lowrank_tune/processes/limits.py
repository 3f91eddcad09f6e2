"""Limits on CPU time and memory within a worker process."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

MEGABYTE = 1 << 20
ALARM_INTERVAL_SECONDS = 0.05  # CPU time; the alarm repeats, because a bare `except` may catch the first


class CallTimeout(BaseException):
    """The time of a call is over. Not an Exception, so that no `except Exception` of a library catches it."""


def _raise_timeout(*_: object) -> None:
    raise CallTimeout


def call_with_time_limit(seconds: float, compute: Callable[[], T]) -> T:
    """Returns what `compute` returns. Raises CallTimeout once it has used `seconds` of CPU time.

    Not a context manager, because the alarm could interrupt its exit before the clock is stopped.
    """
    try:
        try:
            # each time: other code of the process may have set another handler
            signal.signal(signal.SIGPROF, _raise_timeout)
            signal.setitimer(signal.ITIMER_PROF, seconds, ALARM_INTERVAL_SECONDS)
            return compute()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except CallTimeout:
        # the alarm may have interrupted the line above
        signal.setitimer(signal.ITIMER_PROF, 0)
        raise


@contextlib.contextmanager
def added_memory_limit(megabytes: int) -> Iterator[None]:
    """Limits the memory that this process may add in the body to what it had before, within the limits that it was
    started with. Only on Linux; elsewhere nothing is limited."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        maximum = pages * resource.getpagesize() + megabytes * MEGABYTE
        limits = [limit for limit in (maximum, soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def peak_megabytes() -> float:
    """Returns the peak memory of this process. On Linux not `ru_maxrss`, which starts at the large value of the
    parent."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTE
    status = Path("/proc/self/status").read_bytes()
    return int(status.partition(b"VmHWM:")[2].split()[0]) / 1024
