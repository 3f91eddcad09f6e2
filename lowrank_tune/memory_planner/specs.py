"""Simulation specs of a recipe, or of a chain's stages, with adapters from files or from stages that have not run
yet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig

from lowrank_tune.assembly.adapters import read_recipe_adapter
from lowrank_tune.assembly.reward_model import REWARD_ROLE, reward_model_base
from lowrank_tune.assembly.stacks import frozen_adapters
from lowrank_tune.config import AdapterConfig, Chain, RecipeConfig
from lowrank_tune.config.adapter_stack import frozen_stage_names, reward_source_stage
from lowrank_tune.memory_planner.meta_model import meta_lora_config
from lowrank_tune.memory_planner.planner import make_spec
from lowrank_tune.memory_planner.simulation import SimulationSpec

PENDING_PATH = "the adapter of stage "


def simulation_specs(
    loaded: RecipeConfig | Chain,
    device: str,
    skip: Collection[str] = (),
) -> Iterator[SimulationSpec]:
    """Yields the spec of a recipe, or of each stage except those in `skip`. Raises UserError."""
    kind = torch.device(device)
    if not isinstance(loaded, Chain):
        if loaded.name in skip:
            return
        missing = missing_adapters(loaded)
        paths = {name: loaded.adapters[name].model_copy(update={"path": PENDING_PATH + name}) for name in missing}
        pending = loaded.model_copy(update={"adapters": {**loaded.adapters, **paths}})
        yield _stage_spec(
            pending,
            kind,
            dict.fromkeys(missing, loaded.adapters[loaded.trained_adapter]),
            None,
        )
        return
    folders = {stage.name: PENDING_PATH + stage.name for stage in loaded.stages}
    for number, planned in enumerate(loaded.stages):
        if planned.name in skip:
            continue
        pending_adapters = {}
        for earlier in loaded.stages[:number]:
            pending_adapters[earlier.name] = earlier.adapters[earlier.trained_adapter]
        reward_stage = reward_source_stage(loaded.stages, number)
        reward_base_adapters = None
        if reward_stage is not None:
            names = [stage.name for stage in loaded.stages]
            reward_base_adapters = frozen_stage_names(loaded.stages, names.index(reward_stage))
            pending_adapters[REWARD_ROLE] = pending_adapters[reward_stage]
        recipe = loaded.recipe_of(number, folders)
        yield _stage_spec(
            recipe,
            kind,
            pending_adapters,
            reward_base_adapters,
        )


def missing_adapters(recipe: RecipeConfig) -> list[str]:
    """Returns the frozen adapters that do not exist yet. They are planned with the shape of the trained one."""
    trained = (recipe.trained_adapter, *recipe.extra_adapters)
    missing = []
    for name, adapter in recipe.adapters.items():
        if name not in trained and adapter.path and not Path(adapter.path).expanduser().exists():
            missing.append(name)
    return missing


def _stage_spec(
    recipe: RecipeConfig,
    device: torch.device,
    pending_adapters: Mapping[str, AdapterConfig],
    reward_base_adapters: Sequence[str] | None,
) -> SimulationSpec:
    """Returns the spec of one stage. `pending_adapters` are the adapters of earlier stages, which do not exist yet, and
    `reward_base_adapters` the adapters below their reward model."""
    loaded = dict[str, LoraConfig]()
    saved = {}
    for name, adapter in recipe.adapters.items():
        if not adapter.path:
            continue
        if adapter.path.startswith(PENDING_PATH):
            loaded[name] = meta_lora_config(recipe.base, pending_adapters[name])
        else:
            saved[name] = read_recipe_adapter(recipe, name, adapter.path)
            loaded[name] = saved[name].config
    if reward_base_adapters is None:
        reward_base_adapters = ()
        if REWARD_ROLE in saved and recipe.trained_adapter != REWARD_ROLE:
            reward_base_adapters = reward_model_base(saved, frozen_adapters(recipe))
    return make_spec(
        recipe,
        device,
        loaded,
        reward_base_adapters,
    )
