"""`format`: the whole completion matches a regular expression; `regex`: it is found anywhere in it. A negative weight
punishes what matches.

The engine is RE2, whose time is linear in the text: no worker and no clock are needed. `lowrank_tune.regex` says how it
differs from Python's `re`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lowrank_tune.regex import compile_pattern, to_utf8
from lowrank_tune.rewards.base import RewardInput, Score


@dataclass(frozen=True)
class RegexReward:
    """pass (1) or fail (0). `.` is any character but a line break, unless the pattern begins with `(?s)`. Raises
    UserError."""

    name: str
    pattern: str
    full_match: bool
    is_verifier: ClassVar[bool] = False
    _engine: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_engine", compile_pattern(self.pattern))

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        return [self._score(item) for item in items]

    def _score(self, item: RewardInput) -> Score:
        text = to_utf8(item.completion)
        if self.full_match:
            match = self._engine.fullmatch(text)
        else:
            match = self._engine.search(text)
        if match is not None:
            return Score(1.0, "pass")
        return Score(0.0, "fail", "does not match the pattern" if self.full_match else "the pattern is not found")
