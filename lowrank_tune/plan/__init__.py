"""The memory planner: what a run will hold, phase by phase, before any weight is read, and what fits a card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import LoraConfig

from lowrank_tune import settings
from lowrank_tune.build.learned import ROLE, below_reward
from lowrank_tune.build.stacks import lower_of
from lowrank_tune.model.adapters import read_adapter
from lowrank_tune.plan.base import bare_shape
from lowrank_tune.plan.figures import GIB, Phase, Plan
from lowrank_tune.plan.fit import judged
from lowrank_tune.plan.planner import plan_of, scene_of
from lowrank_tune.recipe import Chain
from lowrank_tune.recipe.stack import finished_below, lender

__all__ = ["GIB", "Phase", "Plan", "card_gib", "plan"]

PENDING = "the adapter of stage "


def plan(loaded: settings.Recipe | Chain, vram_gib: float = 0.0, device: str = "cuda") -> Iterator[Plan]:
    """The plan of a recipe, or of each stage of a chain. On `cpu` nothing is compared with `vram_gib`. Raises UserError."""
    kind = torch.device(device)
    vram = round(vram_gib * GIB)
    if not isinstance(loaded, Chain):
        yield _plan(loaded, kind, vram, {}, None)
        return
    folders = {stage.name: PENDING + stage.name for stage in loaded.stages}
    every = [stage.to_dict() for stage in loaded.stages]
    for number in range(len(every)):
        lent = lender(every, number)
        below = None if lent is None else finished_below(every, next(i for i, one in enumerate(every) if one["name"] == lent))
        made = {each.name: each.adapters[each.trained] for each in loaded.stages[:number]}
        yield _plan(loaded.recipe_of(number, folders), kind, vram, made | ({ROLE: made[lent]} if lent else {}), below)


def _plan(recipe: settings.Recipe, device: torch.device, vram: int, made: Mapping[str, settings.Adapter], below: Sequence[str] | None) -> Plan:
    """One stage. `made` are the adapters of earlier stages, which are not there yet; `below` what their reward model lies on."""
    pending = {name for name, adapter in recipe.adapters.items() if adapter.path and adapter.path.startswith(PENDING)}
    saved = {name: read_adapter(str(adapter.path), f"adapters.{name}.path", head=name == ROLE or name in recipe.aside)
             for name, adapter in recipe.adapters.items() if adapter.path and name not in pending}  # fmt: skip
    loaded: dict[str, LoraConfig] = {name: adapter.config for name, adapter in saved.items()}
    loaded |= {name: bare_shape(recipe.base, made[name]) for name in pending}
    if below is None:
        below = below_reward(saved, lower_of(recipe)) if ROLE in saved and recipe.trained != ROLE else ()
    scene = scene_of(recipe, device, vram, loaded, below)
    return judged(scene, plan_of(scene, vram, recipe.name))


def card_gib() -> float | None:
    """Memory of the card that is here."""
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None
