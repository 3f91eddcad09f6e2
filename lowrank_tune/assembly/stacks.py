"""Which adapters a recipe has, of what shape, and which of them speak together."""

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
    """The frozen adapters below the trained one, lowest first."""
    return [
        name for name in recipe.adapters if name not in (recipe.trained_adapter, REWARD_ROLE, *recipe.extra_adapters)
    ]


def build_stacks(
    recipe: RecipeConfig,
    model: Any,
    loaded: Mapping[str, LoraConfig],
    reward_base: Sequence[str],
) -> tuple[dict[str, LoraConfig], dict[str, list[str]]]:
    """The adapters in the order they lie, and the stacks of the roles: the trained adapter over the frozen ones;
    without it, the reference.

    A reward model that is not trained speaks beside them, over those that it was trained over (`reward_base`); so does
    PPO's value, or it is a head on the policy's own stack. `loaded` are the shapes of adapters that come from files.
    """
    trained = recipe.trained_adapter
    frozen = frozen_adapters(recipe)
    stacks = {trained: [*frozen, trained], "reference": frozen}
    if REWARD_ROLE in recipe.adapters and trained != REWARD_ROLE:
        stacks[REWARD_ROLE] = [*reward_base, REWARD_ROLE]
    names = list(dict.fromkeys([*frozen, trained, *stacks.get(REWARD_ROLE, ())]))
    configs = {name: loaded[name] if name in loaded else lora_config(recipe.adapters[name], model) for name in names}
    if "value" in recipe.extra_adapters:
        stacks["value"] = _value_stack(recipe, stacks)
        if recipe.ppo.critic == "separate":
            configs["value"] = _value_config(recipe, model, loaded, configs)
    return configs, stacks


def _value_stack(recipe: RecipeConfig, stacks: Mapping[str, list[str]]) -> list[str]:
    """What the value speaks with: the policy's stack, or what lies below the policy, or below the reward model that it
    is a copy of."""
    if recipe.ppo.critic == "shared":
        return stacks["policy"]
    return [*(stacks[REWARD_ROLE][:-1] if recipe.ppo.critic_init == "reward" else stacks["reference"]), "value"]


def _value_config(
    recipe: RecipeConfig,
    model: Any,
    loaded: Mapping[str, LoraConfig],
    lora_configs: Mapping[str, LoraConfig],
) -> LoraConfig:
    """The value's shape: the reward model's where it is a copy, else its own where it has one, else the policy's."""
    if "value" in loaded:
        return loaded["value"]
    if recipe.ppo.critic_init == "reward":
        return deepcopy(lora_configs[REWARD_ROLE])
    if "value" in recipe.adapters:
        return lora_config(recipe.adapters["value"], model)
    return deepcopy(lora_configs["policy"])
