"""The load of the machine during a run: that of the GPU, else that of the process. With its recent past."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from lowrank_tune.ui.gpu_stats import GIB, GpuReading, GpuStats

POLL_SECONDS = 2.0
"""Seconds between two readings."""
MAX_READINGS = 60
PROC = Path("/proc")
"""What Linux reports of processes; without it nothing is shown of them."""


@dataclass(frozen=True)
class ProcessReading:
    """A process at one moment; 100 % of the CPU is one core."""

    cpu_percent: float
    memory_gib: float


Reading = GpuReading | ProcessReading


class SystemStats:
    """Reads the GPU, or without one the process, every two seconds."""

    def __init__(self, process: int) -> None:
        self.process = process
        self.history: deque[Reading] = deque(maxlen=MAX_READINGS)
        self._gpu = GpuStats()
        self._last_poll = -POLL_SECONDS
        # seconds of processor time, and when they were read
        self._cpu: tuple[float, float] | None = None

    def poll(self) -> bool:
        """Reads if it is time; returns whether there is a new reading."""
        now = time.monotonic()
        if now - self._last_poll < POLL_SECONDS:
            return False
        self._last_poll = now
        reading = self._gpu.read() or self._process_reading(now)
        if reading is None:
            return False
        self.history.append(reading)
        return True

    def _process_reading(self, now: float) -> ProcessReading | None:
        """Returns the load since the last call, None at the first one and if the process is not known here."""
        try:
            # the name of the program may contain blanks and brackets
            fields = (PROC / str(self.process) / "stat").read_text().rpartition(")")[2].split()
            pages = int((PROC / str(self.process) / "statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return None
        used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        before, self._cpu = self._cpu, (used, now)
        if before is None or now <= before[1]:
            return None
        share = (used - before[0]) / (now - before[1])
        return ProcessReading(100 * max(0.0, share), pages * os.sysconf("SC_PAGE_SIZE") / GIB)
