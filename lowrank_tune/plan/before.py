"""Before a run on a card: what `auto` stands for, and whether all of it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lowrank_tune import settings
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Note, Progress
from lowrank_tune.plan.figures import GIB, Plan
from lowrank_tune.plan.fit import chosen, judged
from lowrank_tune.plan.planner import plan_of
from lowrank_tune.plan.scenes import scenes
from lowrank_tune.recipe import Chain

ASIDE = "; train.memory_check=warn tries it all the same"


def fitted(loaded: settings.Recipe | Chain, vram_gib: float, emit: Emit) -> dict[str, Mapping[str, Any]]:
    """What to change in `train` of each stage, by name. Says what was planned. Raises UserError where a stage cannot
    fit, with what to type."""
    stages = [
        stage
        for stage in (loaded.stages if isinstance(loaded, Chain) else (loaded,))
        if stage.train.memory_check != "off"
    ]
    if not stages:
        return {}
    emit(Progress(what="planning memory", done=0, total=len(stages)))
    found = dict(_of_stages(loaded, vram_gib, emit))
    emit(Progress(what="planning memory", done=len(stages), total=len(stages)))
    return found


def _of_stages(loaded: settings.Recipe | Chain, vram_gib: float, emit: Emit) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for scene in scenes(loaded, "cuda"):
        train = scene.recipe.train
        if train.memory_check == "off":
            continue
        vram = round(min(vram_gib, train.memory_budget_gib or vram_gib) * GIB)
        plan = plan_of(scene, vram, scene.recipe.name)
        changes: dict[str, Any] = (
            dict(chosen(scene, plan)) if "auto" in (train.micro_batch_size, train.gradient_checkpointing) else {}
        )
        if changes:
            told = ", ".join(f"train.{key} {value}" for key, value in changes.items())
            emit(Note(message=f"{scene.recipe.name}: auto is {told}, planned for {vram / GIB:.1f} GiB"))
        elif plan.fits:
            emit(Note(message=f"{scene.recipe.name}: {_in_words(plan)}"))
        else:
            _refuse(judged(scene, plan), train.memory_check, emit)
        yield scene.recipe.name, changes


def _in_words(plan: Plan) -> str:
    return f"needs {plan.needed / GIB:.1f} of {plan.vram / GIB:.1f} GiB by plan, most of it in {plan.binding.name}"


def _refuse(plan: Plan, how: str, emit: Emit) -> None:
    told = f"{plan.name or plan.algorithm}: does not fit the card: {_in_words(plan)}; {plan.advice}"
    if how == "refuse":
        raise UserError(told + ASIDE)
    emit(Note(message=told, level="warning"))
