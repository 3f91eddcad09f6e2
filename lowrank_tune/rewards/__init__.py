"""Rewards: what a completion is worth, told by functions that may fail or hang without the run being misled."""

from lowrank_tune.rewards.failures import first_failure, row_rejection_reason
from lowrank_tune.rewards.garbage import make_negative_samples
from lowrank_tune.rewards.groups import zero_std_fraction
from lowrank_tune.rewards.pool import WorkerPool
from lowrank_tune.rewards.preflight import SanityReport, sanity_check_rewards
from lowrank_tune.rewards.protocol import Reward, RewardInput, Score
from lowrank_tune.rewards.uses import WeightedReward, build_rewards, total

__all__ = [
    "RewardInput",
    "SanityReport",
    "Reward",
    "Score",
    "WorkerPool",
    "WeightedReward",
    "zero_std_fraction",
    "sanity_check_rewards",
    "first_failure",
    "make_negative_samples",
    "build_rewards",
    "total",
    "row_rejection_reason",
]
