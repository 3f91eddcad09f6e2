"""Scores of a few completions by one reward, on a worker if the reward needs one."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_tune.rewards import Reward, RewardInput, Score, WorkerPool
from lowrank_tune.rewards.workers.pool import TIMEOUT_SECONDS


def score_items(reward: Reward, items: Sequence[RewardInput], timeout_seconds: float = TIMEOUT_SECONDS) -> list[Score]:
    """Returns one score for each item, in the order of the items."""
    with WorkerPool[int]([reward], 1, timeout_seconds) as pool:
        for number, item in enumerate(items):
            pool.submit(number, item)
        return [scores[0] for scores in pool.collect().values()]
