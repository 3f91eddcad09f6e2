"""The memory of a GPU that a run may use is what is free, with a faked GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from lowrank_tune.assembly.model import limit_gpu
from lowrank_tune.config import load_any
from lowrank_tune.errors import UserError
from lowrank_tune.generation import cache_memory
from lowrank_tune.memory_planner.planned_gpu import planned_gpu
from lowrank_tune.model.gpu_memory import GIB, GpuMemory, budget_of, limit_gpu_memory, read_gpu_memory
from lowrank_tune.model.oom import MemoryLimits

CUDA = torch.device("cuda", 0)


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A GPU of 24 GiB, of which a desktop has 2. Returns the fractions to which the process is limited."""
    found: list[float] = []

    def set_fraction(fraction: float, device: torch.device | None = None) -> None:
        assert device is None or device.index is not None, "torch refuses a device without an index here"
        found.append(fraction)

    answers: Mapping[str, Any] = {
        "is_available": lambda: True,
        "mem_get_info": lambda device=None: (22 * GIB, 24 * GIB),
        "memory_reserved": lambda device=None: 0,
        "get_device_name": lambda device=None: "GPU of a test",
        "set_per_process_memory_fraction": set_fraction,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return found


def test_the_budget_is_what_is_free_and_what_this_process_has() -> None:
    memory = GpuMemory("GPU", free_bytes=20 * GIB, total_bytes=24 * GIB)
    assert memory.budget_bytes / GIB == pytest.approx(20 + 0.25 - 0.3)
    later = replace(memory, free_bytes=12 * GIB, reserved_bytes=8 * GIB)
    assert later.budget_bytes == memory.budget_bytes, "the base of an earlier stage changes nothing"
    nothing_else = replace(memory, free_bytes=24 * GIB)
    assert nothing_else.budget_bytes / GIB == pytest.approx(24 - 0.3), "never more than the GPU has"
    assert replace(memory, free_bytes=0).budget_bytes == 0


def test_a_setting_replaces_what_is_measured() -> None:
    assert budget_of(None, 7) == 7
    assert budget_of(1.5, 7) == 3 * GIB // 2


def test_without_a_gpu_nothing_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_gpu_memory() is None and planned_gpu(None, None).vram_gib == 24
    limit_gpu_memory(GIB)


def test_a_run_is_always_limited_to_what_is_free(fractions: list[float]) -> None:
    recipe = load_any("tiny-sft")
    assert limit_gpu(recipe, 0, None) / GIB == pytest.approx(21.95)
    assert limit_gpu(recipe, 16 * GIB, CUDA) == 16 * GIB, "the budget of its first start"
    assert limit_gpu(load_any("tiny-sft", "train.memory_budget_gib=12"), 16 * GIB, None) == 12 * GIB
    assert limit_gpu(recipe, 8 * GIB, torch.device("cuda")) == 8 * GIB
    assert [fraction * 24 for fraction in fractions] == pytest.approx([21.7, 15.75, 11.75, 7.75])
    assert limit_gpu(recipe, 0, torch.device("cpu")) == 0 and len(fractions) == 4


def test_a_budget_above_the_memory_of_the_gpu_is_refused(fractions: list[float]) -> None:
    with pytest.raises(UserError, match=r"train.memory_budget_gib: the GPU has 24.0 GiB, not 25"):
        limit_gpu(load_any("tiny-sft", "train.memory_budget_gib=25"), 0, None)
    assert not fractions


def test_plan_is_for_what_is_free(fractions: list[float]) -> None:
    assert planned_gpu(None, None).vram_gib == pytest.approx(21.95)


def test_keys_and_values_have_what_is_free_unless_the_run_has_a_budget(fractions: list[float]) -> None:
    """By hand: of 92 % of the budget, 8 GiB stay and 1.5 are workspace."""

    class ResidentRoles:
        class base:
            device = CUDA

        limits = MemoryLimits()

        def resident_bytes(self) -> int:
            return 8 * GIB

    roles: Any = ResidentRoles()
    assert cache_memory.default_cache_bytes(roles) / GIB == pytest.approx(21.95 * 0.92 - 8 - 1.5)
    roles.limits = MemoryLimits(budget_bytes=16 * GIB)
    assert cache_memory.default_cache_bytes(roles) / GIB == pytest.approx(16 * 0.92 - 8 - 1.5)
