"""Limits on CPU time and memory within a worker process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

MEGABYTE = 1 << 20
ALARM_INTERVAL_SECONDS = 0.05  # CPU time; the alarm repeats, because a bare `except` may catch the first


class CallTimeout(BaseException):
    """The time of a call is over. Not an Exception, so that no `except Exception` of a library catches it."""


def raise_timeout(*_: object) -> None:
    raise CallTimeout


def limit_added_memory(megabytes: int) -> None:
    """Limits the memory that this process may add to what it has now, within the limits that it was started with.
    Only on Linux; elsewhere nothing is limited."""
    if sys.platform != "linux":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    maximum = pages * resource.getpagesize() + megabytes * MEGABYTE
    limits = [limit for limit in (maximum, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))


def peak_megabytes() -> float:
    """Returns the peak memory of this process. On Linux not `ru_maxrss`, which starts at the large value of the
    parent."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTE
    status = Path("/proc/self/status").read_bytes()
    return int(status.partition(b"VmHWM:")[2].split()[0]) / 1024
