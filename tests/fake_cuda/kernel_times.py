"""The time of counted work on an RTX 4090, by the planner's constants, which were written before any measurement."""

from __future__ import annotations

from kernel_work import Work

from lowrank_tune.memory_planner.gpu_specs import MIN_KERNEL_SECONDS
from lowrank_tune.memory_planner.kernel_costs import Kernel, KernelKind
from lowrank_tune.memory_planner.planned_gpu import gpu_named
from lowrank_tune.memory_planner.roofline import kernel_seconds

GPU = gpu_named("4090")
KINDS = {
    "elementwise": KernelKind.ELEMENTWISE,
    "unpack": KernelKind.ELEMENTWISE,
    "product": KernelKind.GEMM,
    "fused 4-bit product": KernelKind.NF4,
    "flash attention": KernelKind.FLASH,
    "dense attention": KernelKind.MASKED,
}


def seconds_of(work: Work) -> float:
    """Returns the time of the kernels of some work: that of their bytes or FLOPs, and at least that of the smallest
    kernel for each."""
    together = kernel_seconds(Kernel(KINDS[work.kind], round(work.num_bytes), round(work.flops)), GPU)
    return max(together, work.launches * MIN_KERNEL_SECONDS)
