r"""`math_answer`: the final answer of a completion is the gold answer, as mathematics.

What exact numbers, choices and words can decide is decided at once, as in `answer` (`written.py`): 1,234 = 1234, 3/4 =
0.75, 50 % where the gold says 50, 5 cm where it says 5, (B) where it says B or B) 37.5. The rest goes to math-verify in
a worker process, which knows that \frac{\sqrt{8}}{2} = \sqrt{2}, that 1 < x and (1, \infty) are one set, that x + 1 = y
and 2y = 2x + 2 are one line; of an irrational number it takes six right decimals for the answer. A completion that did
not stop by itself has not answered, an answer of unreasonable size (`written.excess`) is wrong. A gold answer that
cannot be read is never a 0 but an error: a fault of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from lowrank_tune.errors import UserError
from lowrank_tune.rewards.answer import value_of
from lowrank_tune.rewards.pool import alone
from lowrank_tune.rewards.protocol import Item, Reply, Score, Worked, shown
from lowrank_tune.rewards.written import HEADING, WORDS, algebra, choice, decided, excess, final, is_text, tidy, words

INSTALL = "pip install 'lowrank-tune[verifiers]'"


@dataclass(frozen=True)
class MathAnswer(Worked):
    """pass (1) or fail (0); error where the gold answer or the verifier itself is at fault."""

    name: str = "math_answer"
    judges: ClassVar[bool] = True
    limit: ClassVar[float] = 5.0

    def score(self, items: Sequence[Item]) -> list[Score]:
        return alone(self, items)

    def job(self) -> Mapping[str, Any]:
        return {"kind": "verifier", "module": "lowrank_tune.rewards.judges.math", "use": self.name}

    def unusable(self, item: Item) -> str | None:
        """Why a gold answer is none, as far as that shows without a worker; `\\boxed{gold}` scored as a completion
        shows the rest."""
        gold = item.gold
        if gold is None or not gold.strip():
            return "there is none"
        if why := excess(gold):
            return why
        plain = tidy(gold)
        if gold.rstrip().endswith(":") or HEADING.match(plain):
            return "is a heading"
        if value_of(plain) is not None or is_text(plain) and len(plain.split()) <= WORDS or choice(plain) is not None:
            return None
        if len(words(plain)) > WORDS or is_text(plain):
            return "is prose, which no rule can compare"
        return None

    def early(self, item: Item) -> Score | None:
        if why := self.unusable(item):
            return self._no_gold(item, why)
        if not item.stopped:
            return Score(0.0, "fail", "did not stop")
        assert item.gold is not None
        found = final(item.completion)
        if why := excess(found):
            return Score(0.0, "fail", f"{shown(found, 40)} {why}")
        right = decided(found, item.gold)
        return None if right is None else self._score(right, found, item.gold)

    def ask(self, item: Item) -> Mapping[str, Any]:
        return {"found": algebra(final(item.completion)), "gold": algebra(item.gold or "")}

    def judge(self, item: Item, reply: Reply) -> Score:
        if "fault" in reply:
            return self.lost(item, reply["fault"])
        value = reply["value"]
        if "gold" in value:
            return self._no_gold(item, value["gold"])
        found = final(item.completion)
        if "found" in value:
            return Score(0.0, "fail", f"{shown(found, 40)} {value['found']}")
        if not value["same"] and reply["steep"]:  # sympy takes a want of memory for a reason to stop trying
            return self.lost(item, "met its limit on memory")
        return self._score(value["same"], found, item.gold or "")

    def overdue(self, item: Item, seconds: float) -> Score:
        return Score(None, "timeout", f"`{self.name}` could not tell within {seconds:g} s on {item}")

    def lost(self, item: Item, how: str) -> Score:
        return Score(None, "error", f"`{self.name}`: the verifier {how} on {item}")

    def _score(self, right: bool, found: str, gold: str) -> Score:
        return Score(
            float(right), "pass" if right else "fail", "" if right else f"{shown(found, 40)} is not {shown(gold, 40)}"
        )

    def _no_gold(self, item: Item, why: str) -> Score:
        which = "a gold answer is needed, and" if item.gold is None else f"the gold answer {shown(item.gold, 60)}"
        return Score(None, "error", f"`{self.name}`: {which} {why}, for {item}")


def make_math_answer(name: str) -> MathAnswer:
    """The reward, where the packages that it needs are installed. Raises UserError."""
    need(name, "math_verify", "latex2sympy2_extended")
    return MathAnswer(name)


def need(name: str, *modules: str) -> None:
    """Raises UserError, with the cure, where an optional package is missing."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise UserError(f"`{name}` needs the package {' and '.join(missing)}: {INSTALL}")
