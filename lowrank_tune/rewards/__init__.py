"""Rewards: what a completion is worth, told by functions that may fail or hang without the run being misled."""

from lowrank_tune.rewards.failures import failed, unusable
from lowrank_tune.rewards.garbage import garbage
from lowrank_tune.rewards.groups import dead_share
from lowrank_tune.rewards.pool import Scorer
from lowrank_tune.rewards.preflight import Report, examine
from lowrank_tune.rewards.protocol import Item, Reward, Score
from lowrank_tune.rewards.uses import Weighted, make, total

__all__ = [
    "Item",
    "Report",
    "Reward",
    "Score",
    "Scorer",
    "Weighted",
    "dead_share",
    "examine",
    "failed",
    "garbage",
    "make",
    "total",
    "unusable",
]
