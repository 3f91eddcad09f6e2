"""`length`: completions near a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lowrank_tune.rewards.base import RewardInput, Score


@dataclass(frozen=True)
class LengthReward:
    """1 up to `target_tokens`, falling in a straight line to 0 at twice as many."""

    name: str
    target_tokens: int
    is_verifier: ClassVar[bool] = False

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        return [Score(min(1.0, max(0.0, 2.0 - item.tokens / self.target_tokens)), "graded") for item in items]
