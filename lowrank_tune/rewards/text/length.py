"""`length`: rewards completions of at most a target number of tokens. Runs in the main process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lowrank_tune.rewards.base import RewardInput, Score


@dataclass(frozen=True)
class LengthReward:
    """graded: 1 up to `target_tokens`, then linear to 0 at twice as many."""

    name: str
    target_tokens: int
    is_verifier: ClassVar[bool] = False

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        return [self._score(item) for item in items]

    def _score(self, item: RewardInput) -> Score:
        value = 2.0 - item.tokens / self.target_tokens
        return Score(min(1.0, max(0.0, value)), "graded")
