"""A limit on the time that processes take for themselves, whatever else the machine does.

Charged is the time that they run on a processor, and the time that none of their threads could run, as in a sleep. Not
charged is the time in which a thread could run while other programs had the processors. While threads of theirs wait
for each other's processors one of them runs, so that time is charged. The charge never exceeds the wall clock.

CPU time is the kernel's own count. Whether a thread could run is looked up at random times, which no program can
predict.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection

from lowrank_tune.rewards.workers.process_tree import read_tree

SAMPLES = 40  # of the processes within the limit
MAX_SAMPLING_SHARE = 0.05  # of a processor for taking the samples
MAX_WALL_FACTOR = 20  # times its limit that is waited for a process on a busy machine


class TimeLimitReached(Exception):
    """The processes have taken their time."""


class Starved(Exception):
    """Other programs kept the processes from taking their time; the message holds the figures."""


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
        # not the module's own: drawing from it would change what others draw
        self._random = random.Random()
        self._schedule(0.0)

    @property
    def charged(self) -> float:
        """Seconds charged up to the last sample."""
        return min(self._sampled - self._start, self._running + self._asleep)

    @property
    def next_sample(self) -> float:
        """When `check` has to be called next, of time.monotonic."""
        return self._next

    def check(self, replied: bool = False) -> None:
        """Takes a sample where one is due. Raises TimeLimitReached or Starved.

        Call it while the processes are waited for and nothing that they sent is left to read, or, `replied`, when a
        message of theirs has just been read: then they worked until now, though nothing of them may run any more.
        """
        if time.monotonic() < self._next:
            return
        self._sample(replied)
        if self.charged >= self._limit:
            raise TimeLimitReached
        if self._sampled - self._start >= MAX_WALL_FACTOR * self._limit:
            raise Starved(
                f"in {self._sampled - self._start:.0f} s other programs left it {self.charged:.1f} s of the "
                f"{self._limit:g} s that it has"
            )

    def _sample(self, replied: bool) -> None:
        """Charges the time since the last sample, by what is seen now. The first finds no count to compare with, and
        charges all."""
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
        """Draws the time of the next sample, which is never behind the earliest end."""
        interval = max(self._limit / SAMPLES, cost / MAX_SAMPLING_SHARE)
        earliest_end = max(interval / 4, self._limit - self.charged)
        self._next = time.monotonic() + min(earliest_end, interval * self._random.uniform(0.5, 1.5))


def computing_share(seconds: float) -> float:
    """The share of a processor that a program gets now which does nothing but compute: this thread, for so long."""
    start = time.monotonic()
    used = time.thread_time()
    while time.monotonic() - start < seconds:
        pass
    return (time.thread_time() - used) / (time.monotonic() - start)
