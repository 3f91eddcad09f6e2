r"""`math_answer`: the final answer of a completion is the gold answer, as mathematics.

What exact numbers, choices and words can decide is decided at once, as in `answer` (`answer_parsing.py`): 1,234 =
1234, 3/4 = 0.75, 50 % for a gold 50, 5 cm for 5, (B) for B or B) 37.5. The rest goes to math-verify in a worker
process: there \frac{\sqrt{8}}{2} = \sqrt{2}, 1 < x and (1, \infty) are one set, x + 1 = y and 2y = 2x + 2 are one
line; of an irrational number six right decimals are enough.

An answer that cannot be read as a whole is wrong (`latex_syntax.py`): 2n is not 2, 1 2 and 5... are no numbers, 2 = 3
holds nowhere, and a box that nothing closes has no contents. So is an answer of unreasonable size, or one that takes
too much computing. A completion that did not stop by itself has not answered. Of a gold answer that is a whole
solution the box counts. A gold answer that cannot be read is never a 0 but an error: a fault of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from lowrank_tune.errors import UserError
from lowrank_tune.rewards.base import Reply, RewardInput, Score, WorkerReward, truncate_for_display
from lowrank_tune.rewards.completion_box import extract_box
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
from lowrank_tune.rewards.math.latex_syntax import too_large_reason, unreadable_reason
from lowrank_tune.rewards.workers.pool import score_serially

INSTALL_COMMAND = "pip install 'lowrank-tune[verifiers]'"


@dataclass(frozen=True)
class MathAnswerReward(WorkerReward):
    """pass (1) or fail (0); error where the gold answer or the verifier itself is at fault."""

    name: str = "math_answer"
    is_verifier: ClassVar[bool] = True
    max_seconds: ClassVar[float] = 5.0

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        return score_serially(self, items)

    def worker_spec(self) -> Mapping[str, Any]:
        return {"kind": "verifier", "module": "lowrank_tune.rewards.math.math_worker", "use": self.name}

    def row_rejection_reason(self, item: RewardInput) -> str | None:
        """Why a gold answer is none, as far as that shows without a worker; `\\boxed{gold}` scored as a completion
        shows the rest."""
        ground_truth = item.ground_truth
        if ground_truth is None or not ground_truth.strip():
            return "there is none"
        reference = reference_answer(ground_truth)
        if reason := too_large_reason(reference):
            return reason
        plain = normalize_latex(reference)
        if reference.rstrip().endswith(":") or HEADING.match(plain):
            return "is a heading"
        if (
            parse_exact_number(plain) is not None
            or is_text(plain)
            and len(plain.split()) <= MAX_WORDS
            or parse_choice(plain) is not None
            or is_number_with_base(plain)
        ):
            return None
        if len(words(plain)) > MAX_WORDS or is_text(plain):
            return "is prose, which no rule can compare"
        return unreadable_reason(to_algebraic_form(reference))

    def score_without_worker(self, item: RewardInput) -> Score | None:
        if reason := self.row_rejection_reason(item):
            return self._ground_truth_error(item, reason)
        if not item.stopped:
            return Score(0.0, "fail", "did not stop")
        assert item.ground_truth is not None
        answer = extract_final_answer(item.completion)
        reference = reference_answer(item.ground_truth)
        if reason := too_large_reason(answer):
            return self._unreadable(answer, reason)
        correct = compare_exact(answer, reference)
        if correct is not None:
            return self._score(correct, answer, reference)
        reason = unreadable_reason(to_algebraic_form(answer))
        if reason:
            return self._unreadable(answer, reason)
        return None

    def build_request(self, item: RewardInput) -> Mapping[str, Any]:
        return {
            "found": to_algebraic_form(extract_final_answer(item.completion)),
            "gold": to_algebraic_form(reference_answer(item.ground_truth or "")),
        }

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        if "fault" in reply:
            return self.on_worker_crash(item, reply["fault"])
        value = reply["value"]
        if "gold" in value:
            return self._ground_truth_error(item, value["gold"])
        answer = extract_final_answer(item.completion)
        if "found" in value:
            return self._unreadable(answer, value["found"])
        if not value["same"] and reply["steep"]:  # sympy takes a want of memory for a reason to stop trying
            return self.on_worker_crash(item, "met its limit on memory")
        return self._score(value["same"], answer, reference_answer(item.ground_truth or ""))

    def on_timeout(self, item: RewardInput, seconds: float) -> Score:
        return Score(None, "timeout", f"`{self.name}` could not tell within {seconds:g} s on {item}")

    def on_worker_crash(self, item: RewardInput, reason: str) -> Score:
        return Score(None, "error", f"`{self.name}`: the verifier {reason} on {item}")

    def _unreadable(self, answer: str, reason: str) -> Score:
        return Score(0.0, "fail", f"{truncate_for_display(answer, 40)} {reason}")

    def _score(self, correct: bool, answer: str, ground_truth: str) -> Score:
        return Score(
            float(correct),
            "pass" if correct else "fail",
            "" if correct else f"{truncate_for_display(answer, 40)} is not {truncate_for_display(ground_truth, 40)}",
        )

    def _ground_truth_error(self, item: RewardInput, reason: str) -> Score:
        if item.ground_truth is None:
            which = "a gold answer is needed, and"
        else:
            which = f"the gold answer {truncate_for_display(item.ground_truth, 60)}"
        return Score(None, "error", f"`{self.name}`: {which} {reason}, for {item}")


def reference_answer(ground_truth: str) -> str:
    r"""The gold answer of a row; of a whole solution it is what its last `\boxed{}` holds."""
    return extract_box(ground_truth) or ground_truth


def make_math_answer(name: str) -> MathAnswerReward:
    """The reward, where the packages that it needs are installed. Raises UserError."""
    require_packages(name, "math_verify", "latex2sympy2_extended")
    return MathAnswerReward(name)


def require_packages(name: str, *modules: str) -> None:
    """Raises UserError, with the cure, where an optional package is missing."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise UserError(f"`{name}` needs the package {' and '.join(missing)}: {INSTALL_COMMAND}")
