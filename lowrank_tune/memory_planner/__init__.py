"""The memory planner: what a run will hold, phase by phase, before any weight is read, and what fits a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from lowrank_tune.config import Chain, RecipeConfig
from lowrank_tune.memory_planner.fit import with_fit_report
from lowrank_tune.memory_planner.plan_report import GIB, Phase, Plan
from lowrank_tune.memory_planner.planner import plan_of
from lowrank_tune.memory_planner.preflight_check import check_fit
from lowrank_tune.memory_planner.specs import missing_adapters, simulation_specs

__all__ = ["GIB", "Phase", "Plan", "gpu_memory_gib", "check_fit", "plan"]


def plan(loaded: RecipeConfig | Chain, vram_gib: float = 0.0, device: str = "cuda") -> Iterator[Plan]:
    """The plan of a recipe, or of each stage of a chain. On `cpu` nothing is compared with `vram_gib`. Raises
    UserError."""
    for spec in simulation_specs(loaded, device):
        vram = round(min(vram_gib, spec.recipe.train.memory_budget_gib or vram_gib) * GIB)
        fitted_plan = with_fit_report(spec, plan_of(spec, vram, spec.recipe.name))
        yield replace(fitted_plan, notes=(*fitted_plan.notes, *_assumption_notes(loaded)))


def _assumption_notes(loaded: RecipeConfig | Chain) -> list[str]:
    """What was planned in place of what is not there."""
    if isinstance(loaded, Chain):
        return []
    template = "nothing lies at {} yet: adapters.{} is planned like {}"
    return [
        template.format(loaded.adapters[name].path, name, loaded.trained_adapter) for name in missing_adapters(loaded)
    ]


def gpu_memory_gib() -> float | None:
    """Memory of the GPU that is here."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return None
