"""Seconds of counted kernels on a GPU: each takes the time of its bytes or of its FLOPs, whichever is longer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lowrank_tune.memory_planner.gpu_specs import (
    BANDWIDTH_EFFICIENCY,
    FLASH_BACKWARD_EFFICIENCY,
    FLASH_EFFICIENCY,
    FUSED_NF4_EFFICIENCY,
    GEMM_EFFICIENCY,
    LAUNCH_SECONDS,
    MASKED_ATTENTION_BACKWARD_EFFICIENCY,
    MASKED_ATTENTION_EFFICIENCY,
    MIN_KERNEL_SECONDS,
    GpuSpec,
)
from lowrank_tune.memory_planner.kernel_costs import HALF_BYTES, Kernel, KernelKind

EFFICIENCIES = {
    KernelKind.ELEMENTWISE: GEMM_EFFICIENCY,
    KernelKind.GEMM: GEMM_EFFICIENCY,
    KernelKind.FLASH: FLASH_EFFICIENCY,
    KernelKind.FLASH_BACKWARD: FLASH_BACKWARD_EFFICIENCY,
    KernelKind.MASKED: MASKED_ATTENTION_EFFICIENCY,
    KernelKind.MASKED_BACKWARD: MASKED_ATTENTION_BACKWARD_EFFICIENCY,
    KernelKind.NF4: FUSED_NF4_EFFICIENCY,
}
SCALE_BLOCK = 64
"""Weights that share a scale of 4 bytes, which is stored in 1 byte."""


@dataclass(frozen=True)
class PhaseTime:
    """Time of a phase: of its kernels on the GPU, of the host that starts them, and in all. The host starts kernels
    while others run, so the slower of both determines a phase; of several phases in sequence the times are added."""

    gpu_seconds: float = 0.0
    host_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def is_host_bound(self) -> bool:
        return self.host_seconds > self.gpu_seconds

    def times(self, factor: float) -> PhaseTime:
        """Returns the time of `factor` repetitions."""
        return PhaseTime(self.gpu_seconds * factor, self.host_seconds * factor, self.seconds * factor)

    def captured(self) -> PhaseTime:
        """Returns the time of the same kernels in a CUDA graph, which the host starts at once."""
        return PhaseTime(self.gpu_seconds, LAUNCH_SECONDS, self.gpu_seconds)

    def then(self, other: PhaseTime) -> PhaseTime:
        """Returns the time of this phase and another one after it."""
        return PhaseTime(
            self.gpu_seconds + other.gpu_seconds,
            self.host_seconds + other.host_seconds,
            self.seconds + other.seconds,
        )


def phase_time(counts: Mapping[Kernel, float], gpu: GpuSpec) -> PhaseTime:
    """Returns the time of the kernels of a phase."""
    gpu_seconds = 0.0
    launches = 0.0
    for kernel, count in counts.items():
        for part in parts_on(kernel, gpu):
            gpu_seconds += count * kernel_seconds(part, gpu)
            launches += count
    host_seconds = launches * LAUNCH_SECONDS
    return PhaseTime(gpu_seconds, host_seconds, max(gpu_seconds, host_seconds))


def kernel_seconds(kernel: Kernel, gpu: GpuSpec) -> float:
    """Returns max(bytes / bandwidth, FLOPs / rate), at least the time of the smallest kernel."""
    bandwidth = gpu.bandwidth_gb_s * 1e9 * BANDWIDTH_EFFICIENCY
    rate = gpu.half_tflops * 1e12 * EFFICIENCIES[kernel.kind]
    return max(kernel.num_bytes / bandwidth, kernel.flops / rate, MIN_KERNEL_SECONDS)


def parts_on(kernel: Kernel, gpu: GpuSpec) -> Iterator[Kernel]:
    """Yields the kernels that a GPU starts: a 4-bit product of many rows is unpacked first, by three kernels."""
    if kernel.kind != KernelKind.NF4 or _is_fused(kernel, gpu):
        yield kernel
        return
    rows, outputs, inputs = kernel.mnk
    elements = outputs * inputs
    scales = elements // SCALE_BLOCK
    # The scales to fp32, plus their offset, then the weight.
    yield Kernel(KernelKind.ELEMENTWISE, 5 * scales)
    yield Kernel(KernelKind.ELEMENTWISE, 8 * scales)
    yield Kernel(KernelKind.ELEMENTWISE, elements // 2 + 4 * scales + HALF_BYTES * elements)
    activations = rows * (inputs + outputs)
    yield Kernel(KernelKind.GEMM, HALF_BYTES * (elements + activations), kernel.flops)


def _is_fused(kernel: Kernel, gpu: GpuSpec) -> bool:
    rows, outputs, inputs = kernel.mnk
    if outputs > 2 * inputs:
        return rows <= gpu.fused_rows_wide
    return rows <= gpu.fused_rows
