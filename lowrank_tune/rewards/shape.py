"""`format`: the whole completion matches a regular expression.

Python's `re` may search for ever, so a worker does it, with a wall clock and a limit on the text. What is not found to match in that time
counts 0, with the verdict `timeout`, which the run counts on its own: a model that writes such texts must not end a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank_tune.rewards.pool import alone
from lowrank_tune.rewards.protocol import Item, Reply, Score, Worked

LONGEST = 20_000


@dataclass(frozen=True)
class Shape(Worked):
    """pass (1) or fail (0), by `re.fullmatch`: `.` is any character but a line break, unless the pattern begins with `(?s)`."""

    name: str
    pattern: str
    judges: ClassVar[bool] = False
    limit: ClassVar[float] = 1.0

    def score(self, items: Sequence[Item]) -> list[Score]:
        return alone(self, items)

    def job(self) -> Mapping[str, Any]:
        return {"kind": "pattern", "pattern": self.pattern}

    def early(self, item: Item) -> Score | None:
        return Score(0.0, "fail", f"longer than {LONGEST} characters") if len(item.completion) > LONGEST else None

    def judge(self, item: Item, reply: Reply) -> Score:
        if "fault" in reply:
            return Score(None, "error", f"`{self.name}` {reply['fault']} on {item}")
        return Score(1.0, "pass") if reply["value"] else Score(0.0, "fail", "does not match the pattern")

    def overdue(self, item: Item, seconds: float) -> Score:
        return Score(0.0, "timeout", f"the pattern was not found to match within {seconds:g} s")

    def lost(self, item: Item, how: str) -> Score:
        return Score(None, "error", f"`{self.name}`: the worker {how} on {item}")
