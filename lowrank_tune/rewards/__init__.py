"""Rewards: what a completion is worth, told by functions that may fail or hang without the run being misled."""

from lowrank_tune.rewards.base import Reward, RewardInput, Score
from lowrank_tune.rewards.failures import first_failure, row_rejection_reason
from lowrank_tune.rewards.negative_samples import make_negative_samples
from lowrank_tune.rewards.registry import WeightedReward, build_rewards, total
from lowrank_tune.rewards.sanity_check import SanityReport, sanity_check_rewards
from lowrank_tune.rewards.workers.pool import WorkerPool
from lowrank_tune.rewards.zero_std import zero_std_fraction

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
