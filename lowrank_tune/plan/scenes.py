"""The scenes of a recipe, or of a chain's stages, whose adapters come from files or from stages that have not run
yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig

from lowrank_tune import settings
from lowrank_tune.build.learned import ROLE, below_reward
from lowrank_tune.build.stacks import lower_of
from lowrank_tune.model.adapters import read_adapter
from lowrank_tune.plan.base import bare_shape
from lowrank_tune.plan.planner import scene_of
from lowrank_tune.plan.rehearsal import Scene
from lowrank_tune.recipe import Chain
from lowrank_tune.recipe.stack import finished_below, lender

PENDING = "the adapter of stage "


def scenes(loaded: settings.Recipe | Chain, device: str) -> Iterator[Scene]:
    """One of a recipe, or of each stage. Raises UserError."""
    kind = torch.device(device)
    if not isinstance(loaded, Chain):
        absent = absent_from(loaded)
        paths = {name: loaded.adapters[name].model_copy(update={"path": PENDING + name}) for name in absent}
        pending = loaded.model_copy(update={"adapters": {**loaded.adapters, **paths}})
        yield _scene(pending, kind, {name: loaded.adapters[loaded.trained] for name in absent}, None)
        return
    folders = {stage.name: PENDING + stage.name for stage in loaded.stages}
    every = [stage.to_dict() for stage in loaded.stages]
    for number in range(len(every)):
        lent = lender(every, number)
        below = (
            None
            if lent is None
            else finished_below(every, next(i for i, one in enumerate(every) if one["name"] == lent))
        )
        made = {each.name: each.adapters[each.trained] for each in loaded.stages[:number]}
        yield _scene(loaded.recipe_of(number, folders), kind, made | ({ROLE: made[lent]} if lent else {}), below)


def absent_from(recipe: settings.Recipe) -> list[str]:
    """Frozen adapters that another run is still to make. They are supposed to have the shape of the trained one."""
    frozen = {
        name: adapter
        for name, adapter in recipe.adapters.items()
        if name != recipe.trained and name not in recipe.aside
    }
    return [name for name, adapter in frozen.items() if adapter.path and not Path(adapter.path).expanduser().exists()]


def _scene(
    recipe: settings.Recipe, device: torch.device, made: Mapping[str, settings.Adapter], below: Sequence[str] | None
) -> Scene:
    """One stage. `made` are the adapters of earlier stages, which are not there yet; `below` what their reward model
    lies on."""
    pending = {name for name, adapter in recipe.adapters.items() if adapter.path and adapter.path.startswith(PENDING)}
    saved = {
        name: read_adapter(str(adapter.path), f"adapters.{name}.path", head=name == ROLE or name in recipe.aside)
        for name, adapter in recipe.adapters.items()
        if adapter.path and name not in pending
    }
    loaded: dict[str, LoraConfig] = {name: adapter.config for name, adapter in saved.items()}
    loaded |= {name: bare_shape(recipe.base, made[name]) for name in pending}
    if below is None:
        below = below_reward(saved, lower_of(recipe)) if ROLE in saved and recipe.trained != ROLE else ()
    return scene_of(recipe, device, loaded, below)
