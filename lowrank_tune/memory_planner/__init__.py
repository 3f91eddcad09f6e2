"""The memory planner: how much memory each phase of a run needs, computed before any weight is read, what fits a GPU,
and how long the run takes there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from lowrank_tune.config import Chain, RecipeConfig
from lowrank_tune.memory_planner.auto_settings import choice_of, with_auto_advice, with_auto_values
from lowrank_tune.memory_planner.base_notes import base_notes
from lowrank_tune.memory_planner.estimate import estimate_run_time
from lowrank_tune.memory_planner.fit import with_fit_report
from lowrank_tune.memory_planner.gpu_specs import GpuSpec
from lowrank_tune.memory_planner.other_bits import with_other_bits
from lowrank_tune.memory_planner.plan_report import GIB, Phase, Plan
from lowrank_tune.memory_planner.planner import plan_of, vram_bytes
from lowrank_tune.memory_planner.preflight_check import check_fit
from lowrank_tune.memory_planner.run_length import run_length
from lowrank_tune.memory_planner.run_time import RunTime
from lowrank_tune.memory_planner.specs import missing_adapters, simulation_specs
from lowrank_tune.model.base import base_dtype

__all__ = [
    "GIB",
    "Phase",
    "Plan",
    "check_fit",
    "plan",
    "plan_with_time",
]


def plan(
    loaded: RecipeConfig | Chain,
    vram_gib: float = 0.0,
    device: str = "cuda",
) -> Iterator[Plan]:
    """Yields the plan of a recipe, or of each stage of a chain. Without a GPU `vram_gib` is 0, and nothing is compared
    with it. Raises UserError."""
    for stage_plan, _ in plan_with_time(
        loaded,
        vram_gib,
        device,
        None,
    ):
        yield stage_plan


def plan_with_time(
    loaded: RecipeConfig | Chain,
    vram_gib: float,
    device: str,
    gpu: GpuSpec | None,
) -> Iterator[tuple[Plan, RunTime | None]]:
    """Yields each plan of `plan`, with the time of the stage on `gpu`; None without one, or if it does not fit."""
    for spec in simulation_specs(loaded, device):
        vram = vram_bytes(spec, vram_gib)
        fitted_plan = with_fit_report(spec, plan_of(spec, vram, spec.recipe.name))
        choice = choice_of(spec, fitted_plan, gpu)
        fitted_plan = with_other_bits(spec, with_auto_advice(spec, fitted_plan, choice))
        run_time = None
        # The rates of a GPU are those of half precision.
        is_half = base_dtype(spec.recipe.base, spec.device) != torch.float32
        if gpu is not None and fitted_plan.fits and is_half:
            run_time = estimate_run_time(
                with_auto_values(spec, choice),
                choice.plan,
                gpu,
                run_length(spec.recipe),
            )
        notes = (*fitted_plan.notes, *base_notes(spec, fitted_plan), *_assumption_notes(loaded))
        yield replace(fitted_plan, notes=notes), run_time


def _assumption_notes(loaded: RecipeConfig | Chain) -> list[str]:
    """Returns a note for each adapter that does not exist yet."""
    notes = []
    if not isinstance(loaded, Chain):
        for name in missing_adapters(loaded):
            path = loaded.adapters[name].path
            notes.append(f"{path} does not exist yet: adapters.{name} is planned like {loaded.trained_adapter}")
    return notes
