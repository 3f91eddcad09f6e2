"""`reward_model`: the score of a learned reward, the adapter `reward` over the base that the policy stands on too. No
second model.

It reads the very tokens of prompt and completion, all completions of a rollout batch together. Whoever has the base
gives `score_batch`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lowrank_tune.rewards.base import BatchedReward, RewardInput, Score

ScoreBatchFn = Callable[[Sequence[Sequence[int]]], Sequence[float]]
"""Rows of ids to scores."""


@dataclass
class RewardModel(BatchedReward):
    """graded: any figure. It has learned what is liked, which is not what is right, so it does not judge."""

    name: str
    score_batch: ScoreBatchFn | None = None
    is_verifier: ClassVar[bool] = False

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        assert self.score_batch is not None, "the base is loaded before anything is scored"
        start = time.perf_counter()
        scorable = [index for index, item in enumerate(items) if item.ids]
        reason = "it has no prompt, or the chat template refuses it"
        scores: list[Score] = [Score(None, "error", f"`{self.name}` cannot read {item}: {reason}") for item in items]
        for index, value in zip(scorable, self.score_batch([items[index].ids for index in scorable]), strict=True):
            scores[index] = self._to_score(value, items[index])
        seconds = (time.perf_counter() - start) / max(1, len(items))
        return [replace(score, seconds=seconds) for score in scores]

    def _to_score(self, value: float, item: RewardInput) -> Score:
        if not math.isfinite(value):
            return Score(None, "error", f"`{self.name}` gives {value} for {item}")
        return Score(value, "graded")
