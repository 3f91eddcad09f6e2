"""Rates of GPUs from their data sheets, and the share of each rate that kernels are assumed to reach.

All constants of the run-time estimate are here. They were written down before the estimate was compared with any
measurement, and are not adapted to one: an error of the estimate is printed as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

BANDWIDTH_EFFICIENCY = 0.85
"""Share of the memory's bandwidth."""
GEMM_EFFICIENCY = 0.80
FLASH_EFFICIENCY = 0.70
FLASH_BACKWARD_EFFICIENCY = 0.55
MASKED_ATTENTION_EFFICIENCY = 0.40
MASKED_ATTENTION_BACKWARD_EFFICIENCY = 0.30
FUSED_NF4_EFFICIENCY = 0.60
"""Shares of the rate of matrix products. The least certain ones are those of attention with a mask."""
MIN_KERNEL_SECONDS = 2e-6
"""A kernel takes at least this time."""
LAUNCH_SECONDS = 36e-3 / 2988
"""Time of one CPU core to issue an operation from Python: a decode step of 2,988 launches took 36 ms."""
FASTEST = 0.75
SLOWEST = 1.35
"""The range of an estimate, as factors of its time. A judgment: on no consumer GPU was an efficiency measured."""


@dataclass(frozen=True)
class GpuSpec:
    """A GPU. `memory_gib` is what its driver reports, `half_tflops` the dense rate of matrix products in bf16 with sums
    in fp32; for a GPU without bf16 the rate in fp16."""

    name: str
    device_name: str
    """The words that identify the GPU in the name that CUDA reports."""
    memory_gib: float
    bandwidth_gb_s: float
    half_tflops: float
    sm_count: int
    compute_capability: tuple[int, int]
    fused_rows_wide: int
    fused_rows: int
    """Rows up to which bitsandbytes reads a packed 4-bit weight inside the product, by its own table for the shapes of
    models of 7 to 8 billion parameters: for weights with more than twice as many outputs as inputs, and for others."""

    @property
    def has_bf16(self) -> bool:
        return self.compute_capability >= (8, 0)


GPUS = (
    GpuSpec("3090", "RTX 3090", 24.0, 936.0, 71.0, 82, (8, 6), 128, 64),
    GpuSpec("4090", "RTX 4090", 24.0, 1008.0, 165.0, 128, (8, 9), 128, 16),
    GpuSpec("5090", "RTX 5090", 31.8, 1792.0, 209.5, 170, (12, 0), 64, 8),
    GpuSpec("l4", "L4", 22.5, 300.0, 121.0, 58, (8, 9), 128, 32),
    GpuSpec("t4", "T4", 15.0, 320.0, 65.0, 40, (7, 5), 7, 7),
    GpuSpec("a100", "A100", 80.0, 2039.0, 312.0, 108, (8, 0), 64, 5),
    GpuSpec("h100", "H100", 79.6, 3350.0, 989.0, 132, (9, 0), 32, 7),
    GpuSpec("h200", "H200", 140.4, 4800.0, 989.0, 132, (9, 0), 32, 7),
)
"""The data sheets' figures; A100, H100 and H200 in their SXM form, A100 and H100 with 80 GB."""
DEFAULT_GPU = "4090"
"""The planned GPU on a machine without one."""
