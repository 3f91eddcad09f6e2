r"""`symbolic`: the final expression of a completion equals the gold expression in any form: (x+1)^2 and x^2 + 2x + 1.

Runs in the main process and decides whether the texts are expressions of the grammar in `expression.py`; the other
side, `symbolic_worker.py`, compares them. Nothing is evaluated as a program.

- pass: both expressions have the same value, to 200 digits, at 5 random points at which both are defined and real
  (complex if one has the letter i), and sympy found no difference. So x^2/x passes for x, and \sqrt{x}^2 does too.
- fail: at one of these points the values differ, or sympy found a constant difference, or the answer is outside the
  grammar, or undefined where the gold expression is defined.

Decimals are exact: 0.33 is not 1/3. A completion that did not stop by itself gets 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank_tune.rewards.base import Reply, RewardInput, Score, pass_or_fail, require_packages
from lowrank_tune.rewards.math.answer import not_equal_reason
from lowrank_tune.rewards.math.expression import ExpressionParseError, parse_expression
from lowrank_tune.rewards.math.final_answer import extract_final_answer
from lowrank_tune.rewards.math.gold_answer import GoldAnswerVerifier, unreadable_answer


@dataclass(frozen=True)
class SymbolicReward(GoldAnswerVerifier):
    """The verifier `symbolic`."""

    name: str = "symbolic"
    worker_module: ClassVar[str] = "lowrank_tune.rewards.math.symbolic_worker"
    gold_label: ClassVar[str] = "the gold expression"

    def gold_problem(self, ground_truth: str) -> str | None:
        return _parse_error(ground_truth)

    def score_completion(self, item: RewardInput) -> Score | None:
        answer = extract_final_answer(item.completion)
        if reason := _parse_error(answer):
            return unreadable_answer(answer, reason)
        return None

    def build_request(self, item: RewardInput) -> Mapping[str, Any]:
        return {"found": extract_final_answer(item.completion), "gold": item.ground_truth}

    def score_comparison(
        self,
        item: RewardInput,
        answer: str,
        reply: Reply,
    ) -> Score:
        value = reply["value"]
        if value["same"] and not value["confirmed"]:
            return Score(1.0, "pass", "equal at random points; not confirmed by sympy")
        return pass_or_fail(value["same"], not_equal_reason(answer, item.ground_truth or ""))


def _parse_error(text: str) -> str | None:
    try:
        parse_expression(text)
    except ExpressionParseError as error:
        return str(error)
    return None


def make_symbolic(name: str) -> SymbolicReward:
    """Returns the reward. Raises UserError if the package that it needs is not installed."""
    require_packages(name, "sympy")
    return SymbolicReward(name)
