"""Before a run on a card: what `auto` stands for, and whether all of it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lowrank_tune import settings
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage, Progress
from lowrank_tune.memory_planner.fit import choose_micro_batch, with_fit_report
from lowrank_tune.memory_planner.plan_report import GIB, Plan
from lowrank_tune.memory_planner.planner import plan_of
from lowrank_tune.memory_planner.specs import simulation_specs
from lowrank_tune.recipe import Chain

MEMORY_CHECK_HINT = "; train.memory_check=warn tries it all the same"


def check_fit(loaded: settings.RecipeConfig | Chain, vram_gib: float, emit: Emit) -> dict[str, Mapping[str, Any]]:
    """What to change in `train` of each stage, by name. Says what was planned. Raises UserError where a stage cannot
    fit, with what to type."""
    stages = [
        stage
        for stage in (loaded.stages if isinstance(loaded, Chain) else (loaded,))
        if stage.train.memory_check != "off"
    ]
    if not stages:
        return {}
    emit(Progress(description="planning memory", done=0, total=len(stages)))
    changes = dict(_stage_changes(loaded, vram_gib, emit))
    emit(Progress(description="planning memory", done=len(stages), total=len(stages)))
    return changes


def _stage_changes(
    loaded: settings.RecipeConfig | Chain, vram_gib: float, emit: Emit
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for spec in simulation_specs(loaded, "cuda"):
        train = spec.recipe.train
        if train.memory_check == "off":
            continue
        vram = round(min(vram_gib, train.memory_budget_gib or vram_gib) * GIB)
        plan = plan_of(spec, vram, spec.recipe.name)
        changes: dict[str, Any] = (
            dict(choose_micro_batch(spec, plan))
            if "auto" in (train.micro_batch_size, train.gradient_checkpointing)
            else {}
        )
        if changes:
            summary = ", ".join(f"train.{key} {value}" for key, value in changes.items())
            emit(LogMessage(message=f"{spec.recipe.name}: auto is {summary}, planned for {vram / GIB:.1f} GiB"))
        elif plan.fits:
            emit(LogMessage(message=f"{spec.recipe.name}: {_describe(plan)}"))
        else:
            _reject_or_warn(with_fit_report(spec, plan), train.memory_check, emit)
        yield spec.recipe.name, changes


def _describe(plan: Plan) -> str:
    return f"needs {plan.needed / GIB:.1f} of {plan.vram / GIB:.1f} GiB by plan, most of it in {plan.peak_phase.name}"


def _reject_or_warn(plan: Plan, memory_check: str, emit: Emit) -> None:
    message = f"{plan.name or plan.algorithm}: does not fit the card: {_describe(plan)}; {plan.advice}"
    if memory_check == "refuse":
        raise UserError(message + MEMORY_CHECK_HINT)
    emit(LogMessage(message=message, level="warning"))
