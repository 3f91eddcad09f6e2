"""`reward_model`: the score of a learned reward, the adapter `reward` over the base that the policy stands on too. No
second model.

It reads the very tokens of prompt and completion, all completions of a harvest together. Whoever has the base gives
`read`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lowrank_tune.rewards.protocol import Item, Score, Whole

Read = Callable[[Sequence[Sequence[int]]], Sequence[float]]
"""Rows of ids to scores."""


@dataclass
class RewardModel(Whole):
    """graded: any figure. It has learned what is liked, which is not what is right, so it does not judge."""

    name: str
    read: Read | None = None
    judges: ClassVar[bool] = False

    def score(self, items: Sequence[Item]) -> list[Score]:
        assert self.read is not None, "the base is loaded before anything is scored"
        begun, known = time.perf_counter(), [place for place, item in enumerate(items) if item.ids]
        why = "it has no prompt, or the chat template refuses it"
        found: list[Score] = [Score(None, "error", f"`{self.name}` cannot read {item}: {why}") for item in items]
        for place, value in zip(known, self.read([items[place].ids for place in known]), strict=True):
            found[place] = self._told(value, items[place])
        seconds = (time.perf_counter() - begun) / max(1, len(items))
        return [replace(score, seconds=seconds) for score in found]

    def _told(self, value: float, item: Item) -> Score:
        if not math.isfinite(value):
            return Score(None, "error", f"`{self.name}` gives {value} for {item}")
        return Score(value, "graded")
