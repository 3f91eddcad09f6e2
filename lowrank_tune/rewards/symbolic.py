r"""`symbolic`: the final expression of a completion equals the gold expression, whatever its form: (x+1)^2 and x^2 + 2x
+ 1.

What a pass means exactly: both expressions have the same value, to 200 digits, at 5 random points at which both are
defined and real (complex where one holds the letter i), and sympy found no difference; so x^2/x passes for x, and
\sqrt{x}^2 too. What a fail means: at one of these points the values differ, or sympy found a constant difference, or
the answer is outside the grammar of `judges/expression.py`, or undefined where the gold expression is defined. Decimals
are exact: 0.33 is not 1/3. In the grammar nothing is evaluated as a program. A completion that did not stop by itself
has not answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank_tune.rewards.judges.expression import Unreadable, read
from lowrank_tune.rewards.math_answer import need
from lowrank_tune.rewards.pool import alone
from lowrank_tune.rewards.protocol import Item, Reply, Score, Worked, shown
from lowrank_tune.rewards.written import final


@dataclass(frozen=True)
class Symbolic(Worked):
    """pass (1) or fail (0); error where the gold expression or the verifier itself is at fault."""

    name: str = "symbolic"
    judges: ClassVar[bool] = True
    limit: ClassVar[float] = 5.0

    def score(self, items: Sequence[Item]) -> list[Score]:
        return alone(self, items)

    def job(self) -> Mapping[str, Any]:
        return {"kind": "verifier", "module": "lowrank_tune.rewards.judges.symbolic", "use": self.name}

    def unusable(self, item: Item) -> str | None:
        """Why a gold expression is none, as far as that shows without its values."""
        if item.gold is None or not item.gold.strip():
            return "there is none"
        return _unreadable(item.gold)

    def early(self, item: Item) -> Score | None:
        if why := self.unusable(item):
            return self._no_gold(item, why)
        if not item.stopped:
            return Score(0.0, "fail", "did not stop")
        found = final(item.completion)
        if why := _unreadable(found):
            return Score(0.0, "fail", f"{shown(found, 40)} {why}")
        return None

    def ask(self, item: Item) -> Mapping[str, Any]:
        return {"found": final(item.completion), "gold": item.gold}

    def judge(self, item: Item, reply: Reply) -> Score:
        if "fault" in reply:
            return self.lost(item, reply["fault"])
        value, found = reply["value"], final(item.completion)
        if "gold" in value:
            return self._no_gold(item, value["gold"])
        if "found" in value:
            return Score(0.0, "fail", f"{shown(found, 40)} {value['found']}")
        if value["same"]:
            return Score(1.0, "pass", "" if value["confirmed"] else "equal at random points; sympy did not tell")
        return Score(0.0, "fail", f"{shown(found, 40)} is not {shown(item.gold or '', 40)}")

    def overdue(self, item: Item, seconds: float) -> Score:
        return Score(None, "timeout", f"`{self.name}` could not tell within {seconds:g} s on {item}")

    def lost(self, item: Item, how: str) -> Score:
        return Score(None, "error", f"`{self.name}`: the verifier {how} on {item}")

    def _no_gold(self, item: Item, why: str) -> Score:
        which = (
            "a gold expression is needed, and" if item.gold is None else f"the gold expression {shown(item.gold, 60)}"
        )
        return Score(None, "error", f"`{self.name}`: {which} {why}, for {item}")


def _unreadable(text: str) -> str | None:
    try:
        read(text)
    except Unreadable as why:
        return str(why)
    return None


def make_symbolic(name: str) -> Symbolic:
    """The reward, where the package that it needs is installed. Raises UserError."""
    need(name, "sympy")
    return Symbolic(name)
