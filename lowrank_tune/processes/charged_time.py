"""A time limit for processes that does not count the time in which other programs use the processors.

Charged is the time in which the processes run on a processor, and the time in which none of their threads can run, as
in a sleep. Not charged is the time in which a thread could run while other programs use the processors. If threads of
the processes wait for each other's processors, one of them runs, so that time is charged. The charge never exceeds the
wall clock.

The kernel counts the CPU time. Whether a thread can run is sampled at random times, which no program can predict.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection

from lowrank_tune.processes.process_tree import read_tree

SAMPLES = 40  # samples within the limit
MAX_SAMPLING_SHARE = 0.05  # of one processor, for taking the samples
MAX_WALL_FACTOR = 20  # on a busy machine a process may take this many times its limit of wall-clock time


class TimeLimitReached(Exception):
    """The processes have used their time."""


class Starved(Exception):
    """Other programs kept the processes from using their time; the message has the figures."""


class ChargedTime:
    """The time of `roots` and their descendants from now on, against `limit` seconds."""

    def __init__(self, roots: Collection[int], limit: float) -> None:
        self._roots = roots
        self._limit = limit
        self._start = self._sampled = time.monotonic()
        self._running = 0.0
        self._asleep = 0.0
        self._cpu_seconds = 0.0
        self._counted = False
        # its own generator: the module's would change the draws of others
        self._random = random.Random()
        self._schedule(0.0)

    @property
    def charged(self) -> float:
        """Seconds charged up to the last sample."""
        return min(self._sampled - self._start, self._running + self._asleep)

    @property
    def next_sample(self) -> float:
        """The time.monotonic at which `check` has to be called next."""
        return self._next

    def check(self, replied: bool = False) -> None:
        """Takes a sample if one is due. Raises TimeLimitReached or Starved.

        To be called while waiting for the processes, when everything that they sent has been read. `replied`: a message
        of theirs has just been read, so they worked until now even if no thread of theirs can run any more.
        """
        if time.monotonic() < self._next:
            return
        self._sample(replied)
        if self.charged >= self._limit:
            raise TimeLimitReached
        wall_seconds = self._sampled - self._start
        if wall_seconds >= MAX_WALL_FACTOR * self._limit:
            raise Starved(
                f"in {wall_seconds:.0f} s other programs left it {self.charged:.1f} s of the "
                f"{self._limit:g} s of its limit"
            )

    def _sample(self, replied: bool) -> None:
        """Charges the time since the last sample by the current state. The first sample has no CPU time to compare
        with, and charges all."""
        now = time.monotonic()
        used = time.thread_time()
        passed = now - self._sampled
        tree = read_tree(self._roots)
        if tree is not None and self._counted:
            self._running += min(passed, max(0.0, tree.cpu_seconds - self._cpu_seconds))
        if tree is None or not self._counted or not (replied or tree.runnable):
            self._asleep += passed
        if tree is not None:
            self._counted = True
            self._cpu_seconds = tree.cpu_seconds
        self._sampled = now
        self._schedule(time.thread_time() - used)

    def _schedule(self, cost: float) -> None:
        """Draws the time of the next sample, which is never after the earliest possible end."""
        interval = max(self._limit / SAMPLES, cost / MAX_SAMPLING_SHARE)
        earliest_end = max(interval / 4, self._limit - self.charged)
        random_interval = interval * self._random.uniform(0.5, 1.5)
        self._next = time.monotonic() + min(earliest_end, random_interval)


def computing_share(seconds: float) -> float:
    """Returns the share of a processor that a program which only computes gets now, measured by this thread for
    `seconds`."""
    start = time.monotonic()
    used = time.thread_time()
    while time.monotonic() - start < seconds:
        pass
    return (time.thread_time() - used) / (time.monotonic() - start)
