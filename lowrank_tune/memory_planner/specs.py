"""The scenes of a recipe, or of a chain's stages, whose adapters come from files or from stages that have not run
yet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig

from lowrank_tune.assembly.reward_model import REWARD_ROLE, reward_model_base
from lowrank_tune.assembly.stacks import frozen_adapters
from lowrank_tune.config import AdapterConfig, Chain, RecipeConfig
from lowrank_tune.config.adapter_stack import frozen_stage_names, reward_source_stage
from lowrank_tune.memory_planner.meta_model import meta_lora_config
from lowrank_tune.memory_planner.planner import make_spec
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.model.adapters import read_adapter

PENDING_PATH = "the adapter of stage "


def simulation_specs(loaded: RecipeConfig | Chain, device: str, skip: Collection[str] = ()) -> Iterator[SimulationSpec]:
    """One of a recipe, or of each stage but those to `skip`. Raises UserError."""
    kind = torch.device(device)
    if not isinstance(loaded, Chain):
        if loaded.name in skip:
            return
        missing = missing_adapters(loaded)
        paths = {name: loaded.adapters[name].model_copy(update={"path": PENDING_PATH + name}) for name in missing}
        pending = loaded.model_copy(update={"adapters": {**loaded.adapters, **paths}})
        yield _stage_spec(pending, kind, dict.fromkeys(missing, loaded.adapters[loaded.trained_adapter]), None)
        return
    folders = {stage.name: PENDING_PATH + stage.name for stage in loaded.stages}
    for number, planned in enumerate(loaded.stages):
        if planned.name in skip:
            continue
        reward_stage = reward_source_stage(loaded.stages, number)
        if reward_stage is None:
            reward_base_adapters = None
        else:
            names = [stage.name for stage in loaded.stages]
            reward_base_adapters = frozen_stage_names(loaded.stages, names.index(reward_stage))
        pending_adapters = {
            earlier_stage.name: earlier_stage.adapters[earlier_stage.trained_adapter]
            for earlier_stage in loaded.stages[:number]
        }
        yield _stage_spec(
            loaded.recipe_of(number, folders),
            kind,
            pending_adapters | ({REWARD_ROLE: pending_adapters[reward_stage]} if reward_stage else {}),
            reward_base_adapters,
        )


def missing_adapters(recipe: RecipeConfig) -> list[str]:
    """Frozen adapters that another run is still to make. They are supposed to have the shape of the trained one."""
    frozen = {
        name: adapter
        for name, adapter in recipe.adapters.items()
        if name != recipe.trained_adapter and name not in recipe.extra_adapters
    }
    return [name for name, adapter in frozen.items() if adapter.path and not Path(adapter.path).expanduser().exists()]


def _stage_spec(
    recipe: RecipeConfig,
    device: torch.device,
    pending_adapters: Mapping[str, AdapterConfig],
    reward_base_adapters: Sequence[str] | None,
) -> SimulationSpec:
    """One stage. `pending_adapters` are the adapters of earlier stages, which are not there yet; `reward_base_adapters`
    what their reward model lies on."""
    pending = {
        name for name, adapter in recipe.adapters.items() if adapter.path and adapter.path.startswith(PENDING_PATH)
    }
    saved = {
        name: read_adapter(
            str(adapter.path),
            f"adapters.{name}.path",
            head=name == REWARD_ROLE or name in recipe.extra_adapters,
        )
        for name, adapter in recipe.adapters.items()
        if adapter.path and name not in pending
    }
    loaded: dict[str, LoraConfig] = {name: adapter.config for name, adapter in saved.items()}
    loaded |= {name: meta_lora_config(recipe.base, pending_adapters[name]) for name in pending}
    if reward_base_adapters is None:
        if REWARD_ROLE in saved and recipe.trained_adapter != REWARD_ROLE:
            reward_base_adapters = reward_model_base(saved, frozen_adapters(recipe))
        else:
            reward_base_adapters = ()
    return make_spec(recipe, device, loaded, reward_base_adapters)
