"""Plans the memory before a run on a GPU: the values of `auto`, and which stages do not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lowrank_tune.config import Chain, RecipeConfig
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage, Progress, warning
from lowrank_tune.memory_planner.auto_settings import (
    AutoChoice,
    auto_settings_of,
    choose_auto_settings,
    describe_gain,
    describe_values,
    kept_values,
)
from lowrank_tune.memory_planner.fit import with_fit_report
from lowrank_tune.memory_planner.plan_report import GIB, Plan
from lowrank_tune.memory_planner.planned_gpu import installed_gpu_spec
from lowrank_tune.memory_planner.planner import plan_of, vram_bytes
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.memory_planner.specs import simulation_specs

MEMORY_CHECK_HINT = "; train.memory_check=warn tries it all the same"


@dataclass
class MemoryFit:
    """By name of the stage: changes of its `train` settings, why it does not fit this GPU, and why it cannot be
    planned."""

    changes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    errors: dict[str, UserError] = field(default_factory=dict)


def check_fit(
    loaded: RecipeConfig | Chain,
    vram_gib: float,
    emit: Emit,
    skip: Collection[str] = (),
    chosen: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
) -> MemoryFit:
    """Plans each stage except those in `skip`, and logs the result. `vram_gib` is the budget of a stage that sets none,
    and `chosen` the values that settings with `auto` had, by stage, when the run began: they stay."""
    stages = loaded.stages
    names = {stage.name for stage in stages}
    planned = [stage.name for stage in stages if stage.name not in skip and stage.train.memory_check != "off"]
    fit = MemoryFit()
    count = len(planned)
    if not count:
        return fit
    emit(
        Progress(
            description="planning memory",
            done=0,
            total=count,
        )
    )
    for name in planned:
        try:
            for spec in simulation_specs(loaded, "cuda", names - {name}):
                _plan_stage(
                    spec,
                    vram_gib,
                    chosen.get(name, {}),
                    emit,
                    fit,
                )
        except UserError as error:
            fit.errors[name] = error
    emit(
        Progress(
            description="planning memory",
            done=count,
            total=count,
        )
    )
    return fit


def _plan_stage(
    spec: SimulationSpec,
    vram_gib: float,
    chosen: Mapping[str, int],
    emit: Emit,
    fit: MemoryFit,
) -> None:
    name = spec.recipe.name
    train = spec.recipe.train
    if train.memory_budget_gib is not None:
        vram_gib = train.memory_budget_gib
    vram = vram_bytes(spec, vram_gib)
    kept = kept_values(spec, chosen)
    if kept:
        fit.changes[name] = kept
        emit(LogMessage(message=f"{name}: auto is {describe_values(kept)}, as when the run began"))
        return
    plan = plan_of(spec, vram, name)
    for note in plan.notes:
        emit(LogMessage(message=f"{name}: {note}"))
    choice = AutoChoice({}, plan)
    if auto_settings_of(spec):
        choice = choose_auto_settings(spec, plan, installed_gpu_spec())
    fit.changes[name] = choice.values
    if choice.values:
        message = f"{name}: {_describe(choice.plan)}; auto is {describe_values(choice.values)}"
        if choice.gain:
            message += f"; {describe_gain(choice)}"
        emit(LogMessage(message=message))
    elif plan.fits:
        emit(LogMessage(message=f"{name}: {_describe(plan)}"))
    elif train.memory_check == "refuse":
        fit.faults[name] = _does_not_fit(spec, plan) + MEMORY_CHECK_HINT
    else:
        emit(warning(f"{name}: {_does_not_fit(spec, plan)}"))


def _describe(plan: Plan) -> str:
    return f"needs {plan.needed / GIB:.1f} of {plan.vram / GIB:.1f} GiB by plan, most of it in {plan.peak_phase.name}"


def _does_not_fit(spec: SimulationSpec, plan: Plan) -> str:
    return f"does not fit the GPU: {_describe(plan)}; {with_fit_report(spec, plan).advice}"
