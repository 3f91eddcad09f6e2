"""The machine: versions, memory, and the rates that its matrix products and its memory reach in the same run."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "trl", "datasets", "pydantic")


def describe(device: torch.device, memory_cap_gib: float | None) -> dict[str, Any]:
    """Return the device, its memory, the cap, the versions of the packages, and both rates that shares are reported
    of."""
    gpu: dict[str, Any] = {"device": "CPU"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        gpu = {
            "device": properties.name,
            "memory_gib": total_bytes / GIB,
            "free_gib": free_bytes / GIB,
            "cuda": torch.version.cuda,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    rates = {"matmul_tflops": matmul_tflops(device), "bandwidth_gbs": bandwidth_gbs(device)}
    return {**gpu, "memory_cap_gib": memory_cap_gib, **versions(), **rates}


def versions() -> dict[str, str]:
    """Return the version of each installed package of `PACKAGES`. An unpacked copy may have lost its metadata; then
    its module answers."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            try:
                installed[name] = str(getattr(import_module(name), "__version__", "unknown"))
            except ImportError:
                continue
    return installed


def matmul_tflops(device: torch.device) -> float:
    """Return the best rate of a large square matrix product: bf16 on a GPU, fp32 on a CPU."""
    size, dtype, repeats = (8192, torch.bfloat16, 20) if device.type == "cuda" else (512, torch.float32, 5)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / best_seconds(lambda: left @ right, repeats, device) / 1e12


def bandwidth_gbs(device: torch.device) -> float:
    """Return the best rate of a copy within the device's memory, bytes read plus bytes written."""
    size = 1 << (30 if device.type == "cuda" else 24)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / best_seconds(lambda: target.copy_(source), 10, device) / 1e9


def best_seconds(call: Callable[[], Any], repeats: int, device: torch.device, rounds: int = 4) -> float:
    """Return the least mean time of one call over a few rounds. The first round warms up."""
    best = math.inf
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def cap_memory(device: torch.device, cap_gb: float) -> float | None:
    """Limit what this process may allocate on a GPU that has more than `cap_gb`. Returns the limit in GiB, or None."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    if total <= cap_gb * 1e9:
        return None
    torch.cuda.set_per_process_memory_fraction(cap_gb * 1e9 / total, device)
    return cap_gb * 1e9 / GIB


def is_usable(device: torch.device) -> bool:
    """Return whether the device still computes. After an illegal access every later CUDA call of the process fails."""
    try:
        return float(torch.ones(8, device=device).sum()) == 8.0
    except RuntimeError:
        return False


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_unused(device: torch.device) -> None:
    """Collect garbage and return cached blocks to the device."""
    gc.collect()  # modules and hooks refer to each other in cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Return the peak of allocated tensors since the last reset on a GPU, or the peak of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def reserved_gib(device: torch.device) -> float:
    """Return the peak that the allocator held on a GPU since the last reset, fragments included; 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else 0.0
