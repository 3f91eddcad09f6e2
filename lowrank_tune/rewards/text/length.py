"""`length`: rewards completions of at most a target number of tokens. Runs in the main process."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_tune.rewards.base import InProcessReward, RewardInput, Score


@dataclass(frozen=True)
class LengthReward(InProcessReward):
    """graded: 1 up to `target_tokens`, then linear to 0 at twice as many."""

    target_tokens: int

    def score_one(self, item: RewardInput) -> Score:
        value = 2.0 - item.tokens / self.target_tokens
        return Score(min(1.0, max(0.0, value)), "graded")
