"""Recipes: typed settings with defaults and meanings, YAML to settings and back.

Nothing here imports torch, so that a faulty recipe is reported at once.

recipe = Recipe.load("tiny-sft", "train.max_steps=10")
chain = load_any("tiny-preference", "stages.dpo.train.max_steps=10")
faults look like   my.yaml:7: train.learning_rat: unknown key; did you mean `learning_rate`?
"""

from __future__ import annotations

from lowrank_tune.config.base import NON_EMPTY, Fraction, NonEmptyStr, PositiveInt, RunName, Settings, StrList
from lowrank_tune.config.chain import Chain
from lowrank_tune.config.data import DataConfig, SourceConfig, Sources
from lowrank_tune.config.extends import find_preset
from lowrank_tune.config.loading import backends_of, differences, dump, from_dict, load, load_any, presets, schema
from lowrank_tune.config.located import locate
from lowrank_tune.config.model import (
    EXTRA_ADAPTERS,
    TRAINED_ADAPTER,
    AdapterConfig,
    BaseConfig,
    default_adapter_name,
    extra_adapters,
)
from lowrank_tune.config.preferences import DPOConfig, RewardModelConfig
from lowrank_tune.config.presets import Preset, list_presets
from lowrank_tune.config.recipe import Recipe
from lowrank_tune.config.rewards import UNSAFE_CODE, RewardConfig
from lowrank_tune.config.rollouts import GRPOConfig, PPOConfig, RolloutConfig
from lowrank_tune.config.schema import RecipeConfig
from lowrank_tune.config.training import EvaluationConfig, TrainingConfig

__all__ = [
    "AdapterConfig",
    "backends_of",
    "BaseConfig",
    "Chain",
    "DataConfig",
    "default_adapter_name",
    "differences",
    "DPOConfig",
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
