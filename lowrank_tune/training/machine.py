"""Facts of the machine that a run reports: device, memory, versions of the libraries."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

REPORTED_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "datasets")


SHORT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def device_name(
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Returns the name of a device and the dtype that it computes in."""
    short = SHORT_DTYPES[dtype]
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {short}"
    threads = torch.get_num_threads()
    unit = "thread" if threads == 1 else "threads"
    return f"CPU, {threads} {unit}, {short}"


def memory_total_gib(device: torch.device) -> float:
    """Returns the memory of the GPU, or of the machine for a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def library_versions() -> dict[str, str]:
    """Returns the installed version of each reported library."""
    versions = {name: _installed_version(name) for name in REPORTED_LIBRARIES}
    return {name: found for name, found in versions.items() if found is not None}


@cache
def _installed_version(name: str) -> str | None:
    """Returns the version of an installed library, or None. The planner needs it for each of its simulations."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
