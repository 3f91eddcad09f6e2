"""From the settings of a recipe to its algorithm."""

from __future__ import annotations

from typing import Any

from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext
from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.algorithms.grpo import GRPO
from lowrank_tune.algorithms.kto import KTO
from lowrank_tune.algorithms.ppo import PPO
from lowrank_tune.algorithms.reward_model import RewardModeling
from lowrank_tune.algorithms.rollouts import RolloutCollector
from lowrank_tune.algorithms.sft import SFT
from lowrank_tune.assembly.model import micro_tokens_of
from lowrank_tune.config import RecipeConfig


def make_algorithm(
    recipe: RecipeConfig,
    context: AlgorithmContext,
    collector: RolloutCollector | None = None,
) -> Algorithm[Any]:
    """Returns the algorithm of a recipe. An online one needs a `collector`."""
    match recipe.algorithm:
        case "sft":
            return SFT(context)
        case "reward":
            return RewardModeling(context, recipe.reward)
        case "dpo":
            return DPO(context, recipe.dpo)
        case "kto":
            micro_tokens = micro_tokens_of(recipe, recipe.max_train_length)
            return KTO(context, recipe.kto, recipe.data.max_length, micro_tokens)
    assert collector is not None, f"{recipe.algorithm} draws its own rows"
    if recipe.algorithm == "grpo":
        return GRPO(context, recipe.grpo, collector)
    return PPO(context, recipe.ppo, collector)
