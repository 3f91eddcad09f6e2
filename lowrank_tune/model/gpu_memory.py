"""How much of a GPU's memory a run may use: what is free at its start, because other programs use the same GPU.

Under WSL2 the driver moves tensors to the memory of the machine instead of raising an error, which is ten times slower.
So the allocator is always limited to the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank_tune.errors import UserError

GIB = 1 << 30
RESERVE_BYTES = 3 * GIB // 10
"""Bytes that stay free: other programs, a desktop among them, take more while the run goes on."""
CONTEXT_BYTES = GIB // 4
"""Bytes of the CUDA context of a process. Reading the free memory creates it, and no allocator counts it."""


@dataclass(frozen=True)
class GpuMemory:
    """The memory of a GPU at one time; `reserved_bytes` are those of this process's allocator."""

    name: str
    free_bytes: int
    total_bytes: int
    reserved_bytes: int = 0

    @property
    def available_bytes(self) -> int:
        """Bytes that are free, or that this process has: in its allocator, or as its CUDA context."""
        return min(self.free_bytes + self.reserved_bytes + CONTEXT_BYTES, self.total_bytes)

    @property
    def budget_bytes(self) -> int:
        """Bytes that a run which starts now may use, its CUDA context among them."""
        return max(0, self.available_bytes - RESERVE_BYTES)


def read_gpu_memory(device: torch.device | None = None) -> GpuMemory | None:
    """Returns the memory of a GPU now, by default the current one; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return GpuMemory(
        torch.cuda.get_device_name(device),
        free_bytes,
        total_bytes,
        torch.cuda.memory_reserved(device),
    )


def budget_of(setting_gib: float | None, measured_bytes: int) -> int:
    """Returns the budget of a run in bytes: `train.memory_budget_gib` if it is set, else what was measured."""
    if setting_gib is None:
        return measured_bytes
    return round(setting_gib * GIB)


def limit_gpu_memory(budget_bytes: int, device: torch.device | None = None) -> None:
    """Limits this process's allocator to a budget. Raises UserError if the GPU has less. Without a GPU or a budget
    nothing changes."""
    memory = read_gpu_memory(device)
    if memory is None or not budget_bytes:
        return
    if budget_bytes > memory.total_bytes:
        raise UserError(
            f"train.memory_budget_gib: the GPU has {memory.total_bytes / GIB:.1f} GiB, not {budget_bytes / GIB:g}"
        )
    limit = max(0, budget_bytes - CONTEXT_BYTES)
    if device is not None and device.index is None:
        # `cuda` is the current GPU, which this function of torch accepts only as None.
        device = None
    torch.cuda.set_per_process_memory_fraction(limit / memory.total_bytes, device)
