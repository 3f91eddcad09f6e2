"""`python_tests`: the code of a completion passes the unit tests of its row (HumanEval- or MBPP-shaped), in a sandbox.

The code runs in one confined process and the tests in another, with the worker between them: what the tests expect is
never where the code is, values arrive as exact plain types, and the tester alone compares, types too, unless the row's
own reference fails by a type (MBPP has one that returns 0 for False). Tests that pass earn 1; a wrong value, a missing
one, an exception, a crash, or no end in time earns 0. A row whose tests are at fault, a sandbox that does not start, or
a machine too busy to have let the code run is an error or a timeout, and never a 0.

The code is the last fence of the completion that is marked as Python, else its last fence, else all of it. Where the
row's prompt begins a function, the code may be its body. A completion that did not stop by itself has not answered.
Only the standard library can be imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank_tune.errors import UserError
from lowrank_tune.rewards.judges.python_tests import Unusable, row_tests
from lowrank_tune.rewards.pool import alone
from lowrank_tune.rewards.protocol import Item, Reply, Score, Worked
from lowrank_tune.rewards.sandbox.launch import Level
from lowrank_tune.rewards.sandbox.levels import strongest, why_none
from lowrank_tune.settings import UNSAFE_CODE

LONGEST_REASON = 240


@dataclass(frozen=True)
class PythonTests(Worked):
    """pass (1) or fail (0). `accepts_unsafe`: the recipe says in words that code may run without a sandbox where there
    is none."""

    name: str = "python_tests"
    accepts_unsafe: bool = False
    judges: ClassVar[bool] = True

    def score(self, items: Sequence[Item]) -> list[Score]:
        return alone(self, items)

    def level(self) -> Level:
        """The strongest sandbox that this machine offers, tried once. Raises UserError where there is none and none was
        not accepted."""
        if (offer := strongest()) is not None:
            return offer.level
        if self.accepts_unsafe:
            return "none"
        raise UserError(
            f"`{self.name}` runs code that a model wrote, and this machine has no sandbox for it ({why_none()}). "
            f"Linux 5.13 or newer with "
            f"Landlock, or bubblewrap, or user namespaces give one; or say `accept_unsafe_code: {UNSAFE_CODE}`"
        )

    def note(self) -> str:
        """The level in words, for the start-up."""
        offer = strongest()
        return (
            f"{self.name}: code runs in a sandbox ({offer})"
            if offer
            else f"{self.name}: code that a model wrote runs WITHOUT a sandbox"
        )

    def job(self) -> Mapping[str, Any]:
        return {
            "kind": "verifier",
            "module": "lowrank_tune.rewards.judges.python_tests",
            "use": self.name,
            "level": self.level(),
        }

    def unusable(self, item: Item) -> str | None:
        """Why the row's tests are none."""
        try:
            row_tests(item.row)
        except Unusable as why:
            return str(why)
        return None

    def early(self, item: Item) -> Score | None:
        if why := self.unusable(item):
            return Score(None, "error", f"`{self.name}`: {why}, for {item}")
        return None if item.stopped else Score(0.0, "fail", "did not stop")

    def judge(self, item: Item, reply: Reply) -> Score:
        if "fault" in reply:
            return self.lost(item, reply["fault"])
        outcome, reason = reply["value"]["outcome"], inert(reply["value"]["reason"])
        if outcome in ("pass", "fail"):
            return Score(float(outcome == "pass"), outcome, reason)
        return (
            Score(None, "timeout", f"`{self.name}`: {reason}, on {item}")
            if outcome == "late"
            else self.lost(item, reason)
        )

    def overdue(self, item: Item, seconds: float) -> Score:
        return Score(None, "timeout", f"`{self.name}`: the check was not over within {seconds:g} s on {item}")

    def lost(self, item: Item, how: str) -> Score:
        return Score(None, "error", f"`{self.name}`: {inert(how)}, on {item}")


def inert(text: str) -> str:
    """A text of the code's making, with nothing in it that could move a cursor."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:LONGEST_REASON])
