"""What the driver reports of the GPU: memory in use by all processes, temperature, power, load.

Requires nvidia-ml-py and a GPU; without them nothing is shown.
"""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

POLL_SECONDS = 2.0
"""Seconds between two calls of the driver."""
GIB = 2**30


class GpuStats:
    """The first visible GPU. After a first error nothing more is read."""

    def __init__(self) -> None:
        self._driver: Any = None
        self._handle: Any = None
        self._text = ""
        self._last_poll = -POLL_SECONDS
        # not installed, no driver, no GPU: the types of the errors differ by version
        try:
            driver = import_module("pynvml")
            driver.nvmlInit()
            self._handle = driver.nvmlDeviceGetHandleByIndex(0)
            self._driver = driver
        except Exception:
            self._driver = None

    def read(self) -> str:
        """Returns `GPU 19.2/24.0 GiB 71 C 310 W 97 %`, or an empty string."""
        now = time.monotonic()
        if self._driver is not None and now - self._last_poll >= POLL_SECONDS:
            self._last_poll = now
            try:
                self._text = self._measure()
            except Exception:
                self._driver = None
                self._text = ""
        return self._text

    def _measure(self) -> str:
        memory = self._driver.nvmlDeviceGetMemoryInfo(self._handle)
        temperature = self._driver.nvmlDeviceGetTemperature(self._handle, 0)
        power = self._driver.nvmlDeviceGetPowerUsage(self._handle) / 1000
        load = self._driver.nvmlDeviceGetUtilizationRates(self._handle).gpu
        gib = f"{memory.used / GIB:.1f}/{memory.total / GIB:.1f} GiB"
        return f"GPU {gib} {temperature} C {power:.0f} W {load} %"
