"""The machine: its memory, its clock, and what its matrix products and its memory can do at best."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
TOLD = ("torch", "transformers", "peft", "bitsandbytes", "trl", "xformers", "flash-attn")


def describe(device: torch.device, cap: float | None) -> dict[str, Any]:
    """The card, its memory, the cap, the versions, and both roofs."""
    versions = {}
    for name in TOLD:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = torch.__version__ if name == "torch" else None  # a stripped copy of a package may have lost its metadata
    card = {"device": "CPU"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card = {"device": properties.name, "memory GiB": properties.total_memory / GIB, "CUDA": torch.version.cuda,
                "compute capability": f"{properties.major}.{properties.minor}"}  # fmt: skip
    return {**card, "memory cap GiB": cap, **{name: version for name, version in versions.items() if version},
            "roof TFLOP/s": roof(device), "roof GB/s": bandwidth(device)}  # fmt: skip


def roof(device: torch.device) -> float:
    """Best of a few large square matrix products, in TFLOP/s: bf16 on a card, fp32 on a CPU."""
    size, dtype, repeats = (8192, torch.bfloat16, 20) if device.type == "cuda" else (512, torch.float32, 5)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / best_seconds(lambda: left @ right, repeats, device) / 1e12


def bandwidth(device: torch.device) -> float:
    """Best of a few copies within the device's memory, in GB/s, what is read and what is written added up."""
    size = 1 << (30 if device.type == "cuda" else 24)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / best_seconds(lambda: target.copy_(source), 10, device) / 1e9


def best_seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Of a few rounds, the least time of one call. The first round warms up."""
    best = math.inf
    for _ in range(4):
        synchronise(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronise(device)
        best = min(best, (time.perf_counter() - begun) / repeats)
    return best


def cap_memory(device: torch.device, gigabytes: float) -> float | None:
    """Caps what torch may take on a card that has more. Returns the cap in GiB, or None."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    if total <= gigabytes * 1e9:
        return None
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total, device)
    return gigabytes * 1e9 / GIB


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Lets go of what nothing refers to any more."""
    gc.collect()  # modules and hooks refer to each other in circles
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Peak since the last reset on a card; of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def reserved_gib(device: torch.device) -> float:
    """What torch has taken of the card at most since the last reset, with what lies between the tensors."""
    return torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else 0.0
