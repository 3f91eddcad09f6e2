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

from lowrank_tune.rewards.base import Reply, RewardInput, Score, WorkerReward, truncate_for_display
from lowrank_tune.rewards.math.expression import ExpressionParseError, parse_expression
from lowrank_tune.rewards.math.final_answer import extract_final_answer
from lowrank_tune.rewards.math.math_answer import require_packages
from lowrank_tune.rewards.workers.pool import score_serially


@dataclass(frozen=True)
class SymbolicReward(WorkerReward):
    """pass (1) or fail (0); error where the gold expression or the verifier itself is at fault."""

    name: str = "symbolic"
    is_verifier: ClassVar[bool] = True
    max_seconds: ClassVar[float] = 5.0

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        return score_serially(self, items)

    def worker_spec(self) -> Mapping[str, Any]:
        return {"kind": "verifier", "module": "lowrank_tune.rewards.math.symbolic_worker", "use": self.name}

    def row_rejection_reason(self, item: RewardInput) -> str | None:
        """Why a gold expression is none, as far as that shows without its values."""
        if item.ground_truth is None or not item.ground_truth.strip():
            return "there is none"
        return _parse_error(item.ground_truth)

    def score_without_worker(self, item: RewardInput) -> Score | None:
        if reason := self.row_rejection_reason(item):
            return self._ground_truth_error(item, reason)
        if not item.stopped:
            return Score(0.0, "fail", "did not stop")
        answer = extract_final_answer(item.completion)
        if reason := _parse_error(answer):
            return Score(0.0, "fail", f"{truncate_for_display(answer, 40)} {reason}")
        return None

    def build_request(self, item: RewardInput) -> Mapping[str, Any]:
        return {"found": extract_final_answer(item.completion), "gold": item.ground_truth}

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        if "fault" in reply:
            return self.on_worker_crash(item, reply["fault"])
        value = reply["value"]
        answer = extract_final_answer(item.completion)
        if "gold" in value:
            return self._ground_truth_error(item, value["gold"])
        if "found" in value:
            return Score(0.0, "fail", f"{truncate_for_display(answer, 40)} {value['found']}")
        if value["same"]:
            return Score(1.0, "pass", "" if value["confirmed"] else "equal at random points; sympy did not tell")
        return Score(
            0.0,
            "fail",
            f"{truncate_for_display(answer, 40)} is not {truncate_for_display(item.ground_truth or '', 40)}",
        )

    def on_timeout(self, item: RewardInput, seconds: float) -> Score:
        return Score(None, "timeout", f"`{self.name}` could not tell within {seconds:g} s on {item}")

    def on_worker_crash(self, item: RewardInput, reason: str) -> Score:
        return Score(None, "error", f"`{self.name}`: the verifier {reason} on {item}")

    def _ground_truth_error(self, item: RewardInput, reason: str) -> Score:
        if item.ground_truth is None:
            which = "a gold expression is needed, and"
        else:
            which = f"the gold expression {truncate_for_display(item.ground_truth, 60)}"
        return Score(None, "error", f"`{self.name}`: {which} {reason}, for {item}")


def _parse_error(text: str) -> str | None:
    try:
        parse_expression(text)
    except ExpressionParseError as why:
        return str(why)
    return None


def make_symbolic(name: str) -> SymbolicReward:
    """The reward, where the package that it needs is installed. Raises UserError."""
    require_packages(name, "sympy")
    return SymbolicReward(name)
