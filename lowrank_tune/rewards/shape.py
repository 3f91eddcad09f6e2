"""`format`: the whole completion matches a regular expression; `regex`: it is found anywhere in it. A negative weight
punishes what matches.

The engine is RE2, whose time is linear in the text: no worker and no clock are needed. `patterns` says how it differs
from Python's `re`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lowrank_tune.patterns import compiled, encoded
from lowrank_tune.rewards.protocol import Item, Score


@dataclass(frozen=True)
class Shape:
    """pass (1) or fail (0). `.` is any character but a line break, unless the pattern begins with `(?s)`. Raises
    UserError."""

    name: str
    pattern: str
    whole: bool
    judges: ClassVar[bool] = False
    _engine: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_engine", compiled(self.pattern))

    def score(self, items: Sequence[Item]) -> list[Score]:
        return [self._score(item) for item in items]

    def _score(self, item: Item) -> Score:
        text = encoded(item.completion)
        found = self._engine.fullmatch(text) if self.whole else self._engine.search(text)
        if found is not None:
            return Score(1.0, "pass")
        return Score(0.0, "fail", "does not match the pattern" if self.whole else "the pattern is not found")
