"""The part that `math_answer` and `symbolic` share: a worker compares the final answer with the gold answer. Runs in
the main process."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from lowrank_tune.rewards.base import Reply, RewardInput, Score, WorkerVerifier, truncate_for_display
from lowrank_tune.rewards.math.answer import MAX_SHOWN_CHARS
from lowrank_tune.rewards.math.final_answer import extract_final_answer

MAX_SHOWN_GOLD_CHARS = 60  # characters of a gold answer in a reason


@dataclass(frozen=True)
class GoldAnswerVerifier(WorkerVerifier):
    """pass (1) or fail (0); error if the gold answer or the verifier itself is at fault. `gold_label`: the gold answer
    in messages."""

    gold_label: ClassVar[str] = "the gold answer"
    max_seconds: ClassVar[float] = 5.0

    @abstractmethod
    def gold_problem(self, ground_truth: str) -> str | None:
        """Returns why a gold answer cannot be used, as a predicate; None if the main process finds none. The worker
        decides the rest when it grades the gold answer in a box."""

    @abstractmethod
    def score_comparison(
        self,
        item: RewardInput,
        answer: str,
        reply: Reply,
    ) -> Score:
        """Returns the score for a reply of the worker that compared the answer with the gold answer."""

    def row_rejection_reason(self, item: RewardInput) -> str | None:
        if item.ground_truth is None or not item.ground_truth.strip():
            return f"{self.gold_label} is missing"
        problem = self.gold_problem(item.ground_truth)
        return None if problem is None else f"{self.gold_label} {problem}"

    def unusable_row(self, item: RewardInput, reason: str) -> Score:
        if item.ground_truth is not None:
            reason = f"{reason}: {truncate_for_display(item.ground_truth, MAX_SHOWN_GOLD_CHARS)}"
        return self.no_score(item, reason)

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        value = reply["value"]
        if "gold" in value:
            return self.unusable_row(item, f"{self.gold_label} {value['gold']}")
        answer = extract_final_answer(item.completion)
        if "found" in value:
            return unreadable_answer(answer, value["found"])
        return self.score_comparison(item, answer, reply)


def unreadable_answer(answer: str, reason: str) -> Score:
    """Returns the score of an answer that cannot be read, which is wrong. `reason`: a predicate."""
    shown = truncate_for_display(answer, MAX_SHOWN_CHARS)
    return Score(0.0, "fail", f"{shown} {reason}")
