"""What the driver reports of the GPU: load, memory in use by all processes, temperature, power.

The library of the driver (NVML) is called directly, so that no package is needed. Without a GPU nothing is shown.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
GIB = 2**30
TEMPERATURE_GPU = 0
"""The sensor of the chip, for `nvmlDeviceGetTemperature`."""


class _Memory(ctypes.Structure):
    """`nvmlMemory_t`, in bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Utilization(ctypes.Structure):
    """`nvmlUtilization_t`, in percent."""

    _fields_ = (
        ("gpu", ctypes.c_uint),
        ("memory", ctypes.c_uint),
    )


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
    """The first visible GPU."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._library: Any = None
        self._device = ctypes.c_void_p()
        try:
            self._library = ctypes.CDLL(LIBRARY)
            is_open = self._library.nvmlInit_v2() == 0 and self._open(environ.get("CUDA_VISIBLE_DEVICES"))
        except (OSError, AttributeError):
            # no driver, or a very old one
            is_open = False
        if not is_open:
            self._library = None

    def _open(self, visible_devices: str | None) -> bool:
        """Gets the handle of the first visible GPU, which is named by its index or its UUID, or of a part of it (MIG).

        Returns False if there is none: as for CUDA, an empty string or `-1` hides all GPUs.
        """
        name = "0" if visible_devices is None else visible_devices.partition(",")[0].strip()
        handle = ctypes.byref(self._device)
        if name.startswith(("GPU-", "MIG-")):
            return bool(self._library.nvmlDeviceGetHandleByUUID(name.encode(), handle) == 0)
        if not name.isdecimal():
            return False
        return bool(self._library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), handle) == 0)

    def read(self) -> GpuReading | None:
        """Returns the current values, None without a GPU."""
        memory = _Memory()
        if self._library is None or not self._get("nvmlDeviceGetMemoryInfo", memory):
            return None
        load = _Utilization()
        has_load = self._get("nvmlDeviceGetUtilizationRates", load)
        return GpuReading(
            float(load.gpu) if has_load else None,
            memory.used / GIB,
            memory.total / GIB,
            self._number("nvmlDeviceGetTemperature", 1.0, ctypes.c_int(TEMPERATURE_GPU)),
            self._number("nvmlDeviceGetPowerUsage", 1e-3),
            self._number("nvmlDeviceGetEnforcedPowerLimit", 1e-3),
        )

    def _number(
        self,
        function: str,
        scale: float,
        *arguments: object,
    ) -> float | None:
        """Returns a quantity, None if this GPU does not report it."""
        value = ctypes.c_uint()
        if not self._get(function, value, *arguments):
            return None
        return scale * value.value

    def _get(
        self,
        function: str,
        result: object,
        *arguments: object,
    ) -> bool:
        """Calls a function of the driver that writes a result; returns whether there is one and it succeeded."""
        call = getattr(self._library, function, None)
        if call is None:
            return False
        return bool(call(self._device, *arguments, ctypes.byref(result)) == 0)  # type: ignore[arg-type]
