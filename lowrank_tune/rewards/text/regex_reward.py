"""`format`: the whole completion matches a regular expression; `regex`: the expression is found in it.

Runs in the main process: the engine is RE2, whose time is linear in the text, so no time limit is needed.
`lowrank_tune.regex` describes how it differs from Python's `re`. A negative weight makes a penalty of a match.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lowrank_tune.regex import compile_pattern, to_utf8
from lowrank_tune.rewards.base import InProcessReward, RewardInput, Score, pass_or_fail


@dataclass(frozen=True)
class RegexReward(InProcessReward):
    """pass (1) or fail (0). `.` matches any character but a line break, unless the pattern begins with `(?s)`. Raises
    UserError for an invalid pattern."""

    pattern: str
    full_match: bool
    _engine: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_engine", compile_pattern(self.pattern))

    def score_one(self, item: RewardInput) -> Score:
        text = to_utf8(item.completion)
        if self.full_match:
            return pass_or_fail(self._engine.fullmatch(text) is not None, "does not match the pattern")
        return pass_or_fail(self._engine.search(text) is not None, "the pattern is not found")
