r"""`math_answer`: the final answer of a completion is the gold answer, as mathematics.

Runs in the main process and decides all that exact numbers, choices and words can decide (`answer_parsing.py`):
1,234 = 1234, 3/4 = 0.75, 50 % for a gold answer 50, 5 cm for 5, (B) for B or for B) 37.5. The other side,
`math_worker.py`, decides the rest with math-verify: \frac{\sqrt{8}}{2} = \sqrt{2}, 1 < x and (1, \infty) are one set,
x + 1 = y and 2y = 2x + 2 are one line; of an irrational number six correct decimals are enough.

An answer that cannot be read as a whole is wrong (`latex_syntax.py`): 2n is not 2, 1 2 and 5... are not numbers, 2 = 3
does not hold, and a box that is not closed has no contents. An answer that is too long, or needs too much computing, is
wrong too. A completion that did not stop by itself gets 0. If the gold answer is a whole solution, its box counts. A
gold answer that cannot be read is a fault of the data: it gives an error and never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank_tune.rewards.base import Reply, RewardInput, Score, pass_or_fail, require_packages
from lowrank_tune.rewards.math.answer import extract_box, not_equal_reason
from lowrank_tune.rewards.math.answer_parsing import (
    HEADING,
    MAX_WORDS,
    compare_exact,
    is_number_with_base,
    is_text,
    normalize_latex,
    parse_choice,
    parse_exact_number,
    to_algebraic_form,
    words,
)
from lowrank_tune.rewards.math.final_answer import extract_final_answer
from lowrank_tune.rewards.math.gold_answer import GoldAnswerVerifier, unreadable_answer
from lowrank_tune.rewards.math.latex_syntax import too_large_reason, unreadable_reason


@dataclass(frozen=True)
class MathAnswerReward(GoldAnswerVerifier):
    """The verifier `math_answer`."""

    name: str = "math_answer"
    worker_module: ClassVar[str] = "lowrank_tune.rewards.math.math_worker"

    def gold_problem(self, ground_truth: str) -> str | None:
        return _ground_truth_problem(reference_answer(ground_truth))

    def score_completion(self, item: RewardInput) -> Score | None:
        answer = extract_final_answer(item.completion)
        reference = reference_answer(item.ground_truth or "")
        if reason := too_large_reason(answer):
            return unreadable_answer(answer, reason)
        correct = compare_exact(answer, reference)
        if correct is not None:
            return pass_or_fail(correct, not_equal_reason(answer, reference))
        if reason := unreadable_reason(to_algebraic_form(answer)):
            return unreadable_answer(answer, reason)
        return None

    def build_request(self, item: RewardInput) -> Mapping[str, Any]:
        return {
            "found": to_algebraic_form(extract_final_answer(item.completion)),
            "gold": to_algebraic_form(reference_answer(item.ground_truth or "")),
        }

    def score_comparison(
        self,
        item: RewardInput,
        answer: str,
        reply: Reply,
    ) -> Score:
        is_correct = reply["value"]["same"]
        # sympy stops to simplify when memory runs out, so the answer may be right
        if not is_correct and reply["steep"]:
            return self.worker_failure(item, "error", "reached its memory limit")
        return pass_or_fail(is_correct, not_equal_reason(answer, reference_answer(item.ground_truth or "")))


def _ground_truth_problem(reference: str) -> str | None:
    """Returns why a gold answer cannot be compared, as a predicate; None if it can."""
    if reason := too_large_reason(reference):
        return reason
    plain = normalize_latex(reference)
    if reference.rstrip().endswith(":") or HEADING.match(plain):
        return "is a heading"
    is_exact = parse_exact_number(plain) is not None or is_number_with_base(plain)
    is_short_text = is_text(plain) and len(plain.split()) <= MAX_WORDS
    if is_exact or is_short_text or parse_choice(plain) is not None:
        return None
    if is_text(plain) or len(words(plain)) > MAX_WORDS:
        return "is prose, which no rule can compare"
    return unreadable_reason(to_algebraic_form(reference))


def reference_answer(ground_truth: str) -> str:
    r"""Returns the gold answer of a row; of a whole solution the content of its last `\boxed{}`."""
    return extract_box(ground_truth) or ground_truth


def make_math_answer(name: str) -> MathAnswerReward:
    """Returns the reward. Raises UserError if a package that it needs is not installed."""
    require_packages(name, "math_verify", "latex2sympy2_extended")
    return MathAnswerReward(name)
