"""What the driver reports of the GPU: load, memory in use by all processes, temperature, power.

Requires nvidia-ml-py and a GPU; without them nothing is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class GpuReading:
    """The first visible GPU at one moment. A GPU that does not report a quantity has None."""

    utilization: float | None
    """Percent of the last second in which a kernel was running."""
    memory_gib: float
    memory_total_gib: float
    temperature: float | None
    """Degrees Celsius."""
    power: float | None
    """Watts."""
    power_limit: float | None = None


class GpuStats:
    """The first visible GPU. After an error nothing more is read."""

    def __init__(self) -> None:
        self._driver: Any = None
        self._handle: Any = None
        # not installed, no driver, no GPU: the types of the errors differ by version
        try:
            driver = import_module("pynvml")
            driver.nvmlInit()
            self._handle = driver.nvmlDeviceGetHandleByIndex(0)
            self._driver = driver
        except Exception:
            self._driver = None

    def read(self) -> GpuReading | None:
        """Returns the current values, None without a GPU."""
        if self._driver is None:
            return None
        try:
            memory = self._driver.nvmlDeviceGetMemoryInfo(self._handle)
        except Exception:
            self._driver = None
            return None
        return GpuReading(
            _value(self._utilization),
            memory.used / GIB,
            memory.total / GIB,
            _value(self._temperature),
            _value(self._power),
            _value(self._power_limit),
        )

    def _utilization(self) -> float:
        return float(self._driver.nvmlDeviceGetUtilizationRates(self._handle).gpu)

    def _temperature(self) -> float:
        return float(self._driver.nvmlDeviceGetTemperature(self._handle, 0))

    def _power(self) -> float:
        return float(self._driver.nvmlDeviceGetPowerUsage(self._handle) / 1000)

    def _power_limit(self) -> float:
        return float(self._driver.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000)


def _value(read: Callable[[], float]) -> float | None:
    """Returns a quantity, None if this GPU or this driver does not report it."""
    try:
        return read()
    except Exception:
        return None
