"""Kernels by name, launches, the time that the GPU is busy, and the calls that synchronize with it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

TOP_KERNELS = 20
SYNC_MESSAGE = "called a synchronizing CUDA operation"
PROTOTYPE_MESSAGE = "Synchronization debug mode is a prototype feature"
NOT_LAUNCHED = ("Memcpy", "Memset")


@dataclass
class Profile:
    """Filled when the profiled block ends. On the CPU the kernels are torch's operators, and there is nothing to
    wait for."""

    kernels: list[dict[str, Any]] = field(default_factory=list)
    """The `TOP_KERNELS` with the most time: name, count, seconds."""
    launches: int = 0
    busy_seconds: float = 0.0
    """The sum over all kernels and copies."""
    host_syncs: int = 0
    sync_places: dict[str, int] = field(default_factory=dict)
    """`file:line` of calls that wait for the GPU -> how often."""


@contextmanager
def profiled(device: torch.device) -> Iterator[Profile]:
    """Profile a block. Profiling slows it down: measure its wall time without."""
    result = Profile()
    with profile(activities=activities(device)) as profiler:
        with counted_syncs(device) as places:
            yield result
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    fill(result, profiler.key_averages(), device)
    result.sync_places = dict(places.most_common())
    result.host_syncs = sum(places.values())


def activities(device: torch.device) -> list[ProfilerActivity]:
    """Return what to record. On a GPU the host's operators would double the overhead, and kernels are what is needed;
    only a torch without CUPTI needs both."""
    if device.type != "cuda":
        return [ProfilerActivity.CPU]
    kernels_alone = ProfilerActivity.CUDA in supported_activities()
    return [ProfilerActivity.CUDA] if kernels_alone else [ProfilerActivity.CPU, ProfilerActivity.CUDA]


def fill(result: Profile, averages: Any, device: torch.device) -> None:
    """Fill in the kernels of `key_averages()`, which contains one entry for each name."""
    device_type = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    rows = []
    for event in averages:
        if event.device_type != device_type:
            continue
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        rows.append({"name": event.key, "count": event.count, "seconds": microseconds / 1e6})
    rows.sort(key=lambda row: -row["seconds"])
    result.kernels = rows[:TOP_KERNELS]
    result.busy_seconds = sum(row["seconds"] for row in rows)
    result.launches = sum(row["count"] for row in rows if not row["name"].startswith(NOT_LAUNCHED))


@contextmanager
def counted_syncs(device: torch.device) -> Iterator[Counter[str]]:
    """Count the calls that wait for the GPU by the line of Python that makes them. The counter is filled when the block
    ends; other warnings are issued again."""
    places: Counter[str] = Counter()
    if device.type != "cuda":
        yield places
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if SYNC_MESSAGE in str(warning.message):
            places[f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"] += 1
        elif PROTOTYPE_MESSAGE not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
