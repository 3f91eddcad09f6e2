"""`format`: the whole completion matches a regular expression; `regex`: the expression is found in it.

Runs in the main process: the engine is RE2, whose time is linear in the text, so no time limit is needed.
`lowrank_tune.regex` describes how it differs from Python's `re`. A negative weight makes a penalty of a match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lowrank_tune.regex import compile_pattern, to_utf8
from lowrank_tune.rewards.base import RewardInput, Score, pass_or_fail


@dataclass(frozen=True)
class RegexReward:
    """pass (1) or fail (0). `.` matches any character but a line break, unless the pattern begins with `(?s)`. Raises
    UserError for an invalid pattern."""

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
            return pass_or_fail(self._engine.fullmatch(text) is not None, "does not match the pattern")
        return pass_or_fail(self._engine.search(text) is not None, "the pattern is not found")
