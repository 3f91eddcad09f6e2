"""`reward_model`: the score of a trained reward model, the adapter `reward` over the base of the policy.

There is no second base model. The reward model reads the token ids of prompt and completion as they were generated,
for all completions of a rollout batch together. The owner of the base sets `score_batch`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lowrank_tune.rewards.base import BatchedReward, RewardInput, Score

ScoreBatchFn = Callable[[Sequence[Sequence[int]]], Sequence[float]]
"""Returns one score for each row of token ids."""


@dataclass
class RewardModel(BatchedReward):
    """graded: any finite number. Not a verifier: it was trained on preferences, not on correctness."""

    name: str
    score_batch: ScoreBatchFn | None = None
    is_verifier: ClassVar[bool] = False

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        assert self.score_batch is not None, "the base is loaded before anything is scored"
        start = time.perf_counter()
        scorable = [index for index, item in enumerate(items) if item.ids]
        values = self.score_batch([items[index].ids for index in scorable])
        scores = [self._no_score(item) for item in items]
        for index, value in zip(scorable, values, strict=True):
            scores[index] = self._to_score(value, items[index])
        seconds = (time.perf_counter() - start) / max(1, len(items))
        return [replace(score, seconds=seconds) for score in scores]

    def _no_score(self, item: RewardInput) -> Score:
        reason = "it has no prompt, or the chat template refuses it"
        return Score(None, "error", f"`{self.name}` cannot read {item}: {reason}")

    def _to_score(self, value: float, item: RewardInput) -> Score:
        if math.isfinite(value):
            return Score(value, "graded")
        return Score(None, "error", f"`{self.name}` returned {value} for {item}")
