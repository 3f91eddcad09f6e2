"""The memory planner: how much memory each phase of a run needs, computed before any weight is read, and what fits a
GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lowrank_tune.config import Chain, RecipeConfig
from lowrank_tune.memory_planner.auto_settings import with_auto_advice
from lowrank_tune.memory_planner.fit import with_fit_report
from lowrank_tune.memory_planner.plan_report import GIB, Phase, Plan
from lowrank_tune.memory_planner.planner import plan_of, vram_bytes
from lowrank_tune.memory_planner.preflight_check import check_fit
from lowrank_tune.memory_planner.specs import missing_adapters, simulation_specs
from lowrank_tune.model.gpu_memory import read_gpu_memory

__all__ = [
    "GIB",
    "Phase",
    "Plan",
    "gpu_budget_gib",
    "check_fit",
    "plan",
]


def plan(
    loaded: RecipeConfig | Chain,
    vram_gib: float = 0.0,
    device: str = "cuda",
) -> Iterator[Plan]:
    """Yields the plan of a recipe, or of each stage of a chain. Without a GPU `vram_gib` is 0, and nothing is compared
    with it. Raises UserError."""
    for spec in simulation_specs(loaded, device):
        vram = vram_bytes(spec, vram_gib)
        fitted_plan = with_fit_report(spec, plan_of(spec, vram, spec.recipe.name))
        fitted_plan = with_auto_advice(spec, fitted_plan)
        yield replace(fitted_plan, notes=(*fitted_plan.notes, *_assumption_notes(loaded)))


def _assumption_notes(loaded: RecipeConfig | Chain) -> list[str]:
    """Returns a note for each adapter that does not exist yet."""
    notes = []
    if not isinstance(loaded, Chain):
        for name in missing_adapters(loaded):
            path = loaded.adapters[name].path
            notes.append(f"{path} does not exist yet: adapters.{name} is planned like {loaded.trained_adapter}")
    return notes


def gpu_budget_gib() -> float | None:
    """Returns the memory that a run on the GPU of this machine could use now, None without one."""
    memory = read_gpu_memory()
    if memory is None:
        return None
    return memory.budget_bytes / GIB
