"""Memory for keys and values of a rollout."""

from __future__ import annotations

import os

import torch

from lowrank_tune.model.gpu_memory import read_gpu_memory
from lowrank_tune.model.roles import Roles

USABLE_MEMORY_FRACTION = 0.92
"""Share of a GPU's memory that can be used: the rest is lost between blocks."""
WORKSPACE_BYTES = 3 << 29
"""CUDA's context and libraries, logits, and the activations of a prefill: 1.5 GiB."""


def default_cache_bytes(roles: Roles) -> int:
    """Returns the bytes for keys and values. On a GPU: all that the run may use, minus what stays there and some
    workspace, because no activations of an update exist while sequences are decoded. Elsewhere: the memory budget, or
    a quarter of the machine's memory. A run has a budget, the one of its first start, so that it is the same if it is
    continued; without one it is what is free on the GPU now.
    """
    budget = roles.limits.budget_bytes
    device = roles.base.device
    if device.type != "cuda":
        return budget or device_memory(device) // 4
    if not budget:
        memory = read_gpu_memory(device)
        assert memory is not None, "the base is on a GPU"
        budget = memory.budget_bytes
    return gpu_cache_bytes(budget, roles.resident_bytes())


def gpu_cache_bytes(budget: int, resident: int) -> int:
    """Returns the bytes for keys and values of a budget on a GPU where `resident` bytes stay for the whole run."""
    return max(int(budget * USABLE_MEMORY_FRACTION) - resident - WORKSPACE_BYTES, budget // 16)


def device_memory(device: torch.device) -> int:
    """Returns the bytes of a device's memory, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
