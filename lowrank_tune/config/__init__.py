"""Recipes: typed settings with defaults and descriptions, from YAML and back.

Nothing here imports torch, so that problems of a recipe are reported at once.

recipe = Recipe.load("tiny-sft", "train.max_steps=10")
chain = load_any("tiny-preference", "stages.dpo.train.max_steps=10")
problems are printed as   my.yaml:7: train.learning_rat: unknown key; did you mean `learning_rate`?
"""

from __future__ import annotations

from lowrank_tune.config.base import NON_EMPTY, Fraction, NonEmptyStr, PositiveInt, RunName, Settings, StrList
from lowrank_tune.config.chain import Chain, locate
from lowrank_tune.config.data import DataConfig, SourceConfig, Sources
from lowrank_tune.config.dpo import DPOConfig
from lowrank_tune.config.evaluation import EvaluationConfig
from lowrank_tune.config.extends import find_preset
from lowrank_tune.config.grpo import GRPOConfig
from lowrank_tune.config.kto import KTOConfig
from lowrank_tune.config.loading import backends_of, differences, dump, from_dict, load, load_any, schema
from lowrank_tune.config.model import (
    EXTRA_ADAPTERS,
    TRAINED_ADAPTER,
    AdapterConfig,
    BaseConfig,
    default_adapter_name,
    extra_adapters,
)
from lowrank_tune.config.ppo import PPOConfig
from lowrank_tune.config.presets import Preset, list_presets, presets
from lowrank_tune.config.recipe import Recipe
from lowrank_tune.config.reward_model import RewardModelConfig
from lowrank_tune.config.rewards import UNSAFE_CODE, RewardConfig
from lowrank_tune.config.rollout import RolloutConfig
from lowrank_tune.config.schema import RecipeConfig
from lowrank_tune.config.training import TrainingConfig

__all__ = [
    "AdapterConfig",
    "backends_of",
    "BaseConfig",
    "Chain",
    "DataConfig",
    "default_adapter_name",
    "differences",
    "DPOConfig",
    "KTOConfig",
    "dump",
    "EvaluationConfig",
    "EXTRA_ADAPTERS",
    "extra_adapters",
    "find_preset",
    "Fraction",
    "from_dict",
    "GRPOConfig",
    "list_presets",
    "load",
    "load_any",
    "locate",
    "NON_EMPTY",
    "NonEmptyStr",
    "PositiveInt",
    "PPOConfig",
    "Preset",
    "presets",
    "Recipe",
    "RecipeConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RunName",
    "schema",
    "Settings",
    "SourceConfig",
    "Sources",
    "StrList",
    "TRAINED_ADAPTER",
    "TrainingConfig",
    "UNSAFE_CODE",
]
