"""What becomes of a completion that a reward could not judge: never a 0."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_tune.rewards.base import RewardInput, Score, ValidatesRows
from lowrank_tune.rewards.registry import WeightedReward


def row_rejection_reason(weighted: Sequence[WeightedReward], item: RewardInput) -> str | None:
    """Why a row is of no use to a reward, whatever the completion: a fault of the data, found before anything is
    drawn."""
    for weighted_reward in weighted:
        if (
            isinstance(weighted_reward.reward, ValidatesRows)
            and (reason := weighted_reward.reward.row_rejection_reason(item)) is not None
        ):
            return f"`{weighted_reward.name}` cannot judge by it: {reason}"
    return None


def first_failure(weighted: Sequence[WeightedReward], scores: Sequence[Score]) -> tuple[WeightedReward, Score] | None:
    """The first reward that could not tell what a completion is worth, with its score; one that stops the run before
    one that drops."""
    failures = [
        (weighted_reward, score) for weighted_reward, score in zip(weighted, scores, strict=True) if score.value is None
    ]
    return min(failures, key=lambda failure: failure[0].on_error != "stop", default=None)
