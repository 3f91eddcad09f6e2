"""The memory planner: what a run will hold, phase by phase, before any weight is read, and what fits a card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from lowrank_tune import settings
from lowrank_tune.plan.before import fitted
from lowrank_tune.plan.figures import GIB, Phase, Plan
from lowrank_tune.plan.fit import judged
from lowrank_tune.plan.planner import plan_of
from lowrank_tune.plan.scenes import absent_from, scenes
from lowrank_tune.recipe import Chain

__all__ = ["GIB", "Phase", "Plan", "card_gib", "fitted", "plan"]


def plan(loaded: settings.Recipe | Chain, vram_gib: float = 0.0, device: str = "cuda") -> Iterator[Plan]:
    """The plan of a recipe, or of each stage of a chain. On `cpu` nothing is compared with `vram_gib`. Raises
    UserError."""
    for scene in scenes(loaded, device):
        vram = round(min(vram_gib, scene.recipe.train.memory_budget_gib or vram_gib) * GIB)
        found = judged(scene, plan_of(scene, vram, scene.recipe.name))
        yield replace(found, notes=(*found.notes, *_supposed(loaded)))


def _supposed(loaded: settings.Recipe | Chain) -> list[str]:
    """What was planned in place of what is not there."""
    if isinstance(loaded, Chain):
        return []
    told = "nothing lies at {} yet: adapters.{} is planned like {}"
    return [told.format(loaded.adapters[name].path, name, loaded.trained) for name in absent_from(loaded)]


def card_gib() -> float | None:
    """Memory of the card that is here."""
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None
