"""What the GPU reports: memory in use by all, temperature, power, load. Only where nvidia-ml-py is installed
and finds a GPU."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

POLL_SECONDS = 2.0  # seconds between two questions to the driver


class GpuStats:
    """The first visible GPU. Silent for ever after the first thing that goes wrong."""

    def __init__(self) -> None:
        self._driver: Any = None
        self._handle: Any = None
        self._text = ""
        self._last_poll = -POLL_SECONDS
        try:
            pynvml = import_module("pynvml")  # optional: no dependency of the kit
            pynvml.nvmlInit()
            self._driver = pynvml
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # not installed, no driver, no GPU: the kinds differ by version
            self._driver = None

    def read(self) -> str:
        """`GPU 19.2/24.0 GiB 71 C 310 W 97 %`, or nothing."""
        now = time.monotonic()
        if self._driver is not None and now - self._last_poll >= POLL_SECONDS:
            self._last_poll = now
            try:
                memory = self._driver.nvmlDeviceGetMemoryInfo(self._handle)
                temperature = self._driver.nvmlDeviceGetTemperature(self._handle, 0)
                power = self._driver.nvmlDeviceGetPowerUsage(self._handle) / 1000
                load = self._driver.nvmlDeviceGetUtilizationRates(self._handle).gpu
                self._text = (
                    f"GPU {memory.used / 2**30:.1f}/{memory.total / 2**30:.1f} GiB {temperature} C {power:.0f} W "
                    f"{load} %"
                )
            except Exception:
                self._driver = None
                self._text = ""
        return self._text
