"""Every setting of a recipe: typed, strict, frozen, with its default and its meaning. Imports no torch, so that a
faulty recipe is reported at once."""

from __future__ import annotations

from lowrank_tune.settings.common import NON_EMPTY, Fraction, NonEmptyStr, PositiveInt, RunName, Settings, StrList
from lowrank_tune.settings.data import DataConfig, SourceConfig, Sources
from lowrank_tune.settings.model import (
    EXTRA_ADAPTERS,
    TRAINED_ADAPTER,
    AdapterConfig,
    BaseConfig,
    default_adapter_name,
    extra_adapters,
)
from lowrank_tune.settings.preferences import DPOConfig, RewardModelConfig
from lowrank_tune.settings.recipe import RecipeConfig
from lowrank_tune.settings.rewards import UNSAFE_CODE, RewardConfig
from lowrank_tune.settings.rollouts import GRPOConfig, PPOConfig, RolloutConfig
from lowrank_tune.settings.train import EvaluationConfig, TrainingConfig

__all__ = [
    "EXTRA_ADAPTERS",
    "AdapterConfig",
    "BaseConfig",
    "DataConfig",
    "DPOConfig",
    "EvaluationConfig",
    "GRPOConfig",
    "NonEmptyStr",
    "NON_EMPTY",
    "PositiveInt",
    "PPOConfig",
    "RecipeConfig",
    "RewardModelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunName",
    "Settings",
    "Fraction",
    "SourceConfig",
    "Sources",
    "TRAINED_ADAPTER",
    "TrainingConfig",
    "UNSAFE_CODE",
    "StrList",
    "extra_adapters",
    "default_adapter_name",
]
