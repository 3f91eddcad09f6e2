"""The rewards of a recipe with their weights, and their scores for one completion: weighted sum and failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowrank_tune import functional
from lowrank_tune.rewards.base import Reward, RewardInput, Score, ValidatesRows
from lowrank_tune.rewards.user_function import UserFunctionReward


@dataclass(frozen=True)
class WeightedReward:
    """A reward of a recipe under its unique name. `on_error`: whether a failed score stops the run or drops the
    completion. `kind`: the setting of the recipe, if it is given."""

    name: str
    weight: float
    reward: Reward
    on_error: Literal["stop", "drop"] = "drop"
    kind: Literal["verifier", "shaping"] | None = None

    @property
    def is_verifier(self) -> bool:
        """Whether it decides which answers are correct."""
        if self.kind is None:
            return self.reward.is_verifier
        return self.kind == "verifier"

    @property
    def must_separate(self) -> bool:
        """Whether it has to separate reference answers from wrong ones by itself. A user's function only has to if the
        recipe sets `kind: verifier`; else the weighted sum has to."""
        if self.kind is None and isinstance(self.reward, UserFunctionReward):
            return False
        return self.is_verifier


def weighted_sum(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Returns the sum of weight * value over the rewards of one completion.

    Returns None if a value is None (the reward failed): a failed reward is never counted as 0. NaN and infinite values
    give NaN or an infinite sum, as in float arithmetic. The sum of no rewards is 0. Raises ValueError if the numbers of
    values and weights differ.
    """
    if len(values) != len(weights):
        raise ValueError(f"{len(values)} values, but {len(weights)} weights")
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return None
    return functional.weighted_sum(present, weights)


def row_rejection_reason(weighted: Sequence[WeightedReward], item: RewardInput) -> str | None:
    """Returns why a reward cannot use a row, whatever the completion; None if all can. Such a row is a fault of the
    data that is found before anything is generated."""
    for weighted_reward in weighted:
        reward = weighted_reward.reward
        if not isinstance(reward, ValidatesRows):
            continue
        reason = reward.row_rejection_reason(item)
        if reason is not None:
            return f"`{weighted_reward.name}` cannot use the row: {reason}"
    return None


def first_failure(weighted: Sequence[WeightedReward], scores: Sequence[Score]) -> tuple[WeightedReward, Score] | None:
    """Returns the first reward without a value and its score; rewards that stop the run come before those that drop
    the completion. None if all have a value."""
    pairs = zip(weighted, scores, strict=True)
    failures = [(weighted_reward, score) for weighted_reward, score in pairs if score.value is None]
    return min(
        failures,
        key=lambda failure: failure[0].on_error != "stop",
        default=None,
    )
