"""The memory planner's kernel counts, which its run-time estimates use, against those of the fake CUDA device.

The two counters share no code: the planner's sees the operators of its simulation on meta tensors, the fake device's
those of the kit's own step on CUDA tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fake_guard import run_on_fake_gpu
from require_fake_gpu import require_fake_gpu

from lowrank_tune.config import load_any
from lowrank_tune.memory_planner.kernel_costs import Kernel
from lowrank_tune.memory_planner.meta_model import layers_of
from lowrank_tune.memory_planner.planned_gpu import gpu_named
from lowrank_tune.memory_planner.roofline import parts_on
from lowrank_tune.memory_planner.simulation import count_kernels
from lowrank_tune.memory_planner.specs import simulation_specs

WORKER = Path(__file__).with_name("fake_worker.py")
# The planned micro-batch is that of `count_plain_steps` in the worker.
RECIPE = (
    "llama-3.1-8b-sft",
    "data.max_length=2048",
    "train.micro_batch_size=4",
    "train.micro_batch_tokens=null",
    "train.logits_chunk=16777216",
    # The fake device runs plain layers.
    "train.torch_compile=false",
)
LAYERS = 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _fake_cuda_available() -> None:
    require_fake_gpu()


@pytest.fixture(scope="module")
def counted(request: pytest.FixtureRequest) -> Any:
    folder = Path(request.config.cache.mkdir("fake_cuda"))  # type: ignore[union-attr]
    return run_on_fake_gpu(folder, WORKER, "planned")


@cache
def planned(recomputed: int) -> list[tuple[Kernel, float]]:
    (spec,) = simulation_specs(load_any(*RECIPE), "cuda")
    counts: Mapping[Kernel, float] = count_kernels(spec, layers_of(spec.config, recomputed)[:LAYERS])["update"]
    gpu = gpu_named("4090")
    return [(part, count) for kernel, count in counts.items() for part in parts_on(kernel, gpu)]


@pytest.mark.parametrize(("checkpointing", "recomputed"), [("all", LAYERS), ("none", 0)])
def test_the_planner_counts_what_the_fake_device_counts(checkpointing: str, recomputed: int, counted: Any) -> None:
    found = counted[checkpointing]
    kernels = planned(recomputed)
    assert sum(kernel.flops * count for kernel, count in kernels) == sum(found["flops_by_kind"].values()) > 1e13
    assert sum(count for _, count in kernels) == pytest.approx(found["launches"], rel=0.05)
    num_bytes = sum(kernel.num_bytes * count for kernel, count in kernels)
    assert num_bytes == pytest.approx(sum(found["bytes_by_kind"].values()), rel=0.05)
