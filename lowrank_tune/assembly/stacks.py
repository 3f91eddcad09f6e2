"""The adapters of a recipe, their shapes, and the stack of each role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from peft import LoraConfig

from lowrank_tune.assembly.reward_model import REWARD_ROLE
from lowrank_tune.config import RecipeConfig
from lowrank_tune.model.adapters import lora_config

ROLES_WITH_HEAD = {"reward", "value"}
"""Roles with a scalar head."""


def frozen_adapters(recipe: RecipeConfig) -> list[str]:
    """Returns the frozen adapters below the trained one, lowest first."""
    others = (recipe.trained_adapter, REWARD_ROLE, *recipe.extra_adapters)
    return [name for name in recipe.adapters if name not in others]


def build_stacks(
    recipe: RecipeConfig,
    model: Any,
    loaded: Mapping[str, LoraConfig],
    reward_base: Sequence[str],
) -> tuple[dict[str, LoraConfig], dict[str, list[str]]]:
    """Returns the shapes of all adapters and the stacks of all roles, lowest adapter first.

    The trained role is the trained adapter over the frozen ones, and the reference is the frozen ones alone. A reward
    model that is not trained has a stack of its own: its adapter over `reward_base`. The value of PPO has one too, or
    it is a head on the stack of the policy. `loaded` contains the shapes of adapters from files.
    """
    trained = recipe.trained_adapter
    frozen = frozen_adapters(recipe)
    stacks = {trained: [*frozen, trained], "reference": frozen}
    if REWARD_ROLE in recipe.adapters and trained != REWARD_ROLE:
        stacks[REWARD_ROLE] = [*reward_base, REWARD_ROLE]
    configs: dict[str, LoraConfig] = {}
    for name in (*frozen, trained, *stacks.get(REWARD_ROLE, ())):
        if name in configs:
            continue
        if name in loaded:
            configs[name] = loaded[name]
        else:
            configs[name] = lora_config(recipe.adapters[name], model)
    if "value" in recipe.extra_adapters:
        stacks["value"] = _value_stack(recipe, stacks)
        if recipe.ppo.critic == "separate":
            configs["value"] = _value_config(
                recipe,
                model,
                loaded,
                configs,
            )
    return configs, stacks


def _value_stack(recipe: RecipeConfig, stacks: Mapping[str, list[str]]) -> list[str]:
    """Returns the stack of the value: that of the policy for a shared critic; else its own adapter over what is below
    the policy, or over what is below the reward model that it is a copy of."""
    if recipe.ppo.critic == "shared":
        return stacks["policy"]
    if recipe.ppo.critic_init == "reward":
        below = stacks[REWARD_ROLE][:-1]
    else:
        below = stacks["reference"]
    return [*below, "value"]


def _value_config(
    recipe: RecipeConfig,
    model: Any,
    loaded: Mapping[str, LoraConfig],
    lora_configs: Mapping[str, LoraConfig],
) -> LoraConfig:
    """Returns the shape of the value: that of its file, of the reward model that it is a copy of, of its own settings,
    or of the policy."""
    if "value" in loaded:
        return loaded["value"]
    if recipe.ppo.critic_init == "reward":
        return deepcopy(lora_configs[REWARD_ROLE])
    if "value" in recipe.adapters:
        return lora_config(recipe.adapters["value"], model)
    return deepcopy(lora_configs["policy"])
