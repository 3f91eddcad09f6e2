"""Every setting of a recipe: typed, strict, frozen, with its default and its meaning. No torch here: a fault is told in
a second.

Names are those that users of the Hugging Face libraries already know. `recipe` reads them from YAML.
"""

from __future__ import annotations

from lowrank_tune.settings.common import NOT_EMPTY, Line, Positive, RunName, Settings, Share, Words
from lowrank_tune.settings.data import Data, Source, Sources
from lowrank_tune.settings.model import ASIDE, TRAINED, Adapter, Base, aside, trained_by
from lowrank_tune.settings.preferences import Dpo, RewardModel
from lowrank_tune.settings.recipe import Recipe
from lowrank_tune.settings.rewards import UNSAFE_CODE, RewardUse
from lowrank_tune.settings.rollouts import Grpo, Ppo, Rollout
from lowrank_tune.settings.train import Evaluate, Train

__all__ = [
    "ASIDE",
    "Adapter",
    "Base",
    "Data",
    "Dpo",
    "Evaluate",
    "Grpo",
    "Line",
    "NOT_EMPTY",
    "Positive",
    "Ppo",
    "Recipe",
    "RewardModel",
    "RewardUse",
    "Rollout",
    "RunName",
    "Settings",
    "Share",
    "Source",
    "Sources",
    "TRAINED",
    "Train",
    "UNSAFE_CODE",
    "Words",
    "aside",
    "trained_by",
]
