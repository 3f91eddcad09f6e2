"""The reward of both sides: 1 for a completion that stops and whose final answer is the gold answer, else 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank_tune.rewards.base import RewardInput
from lowrank_tune.rewards.math.answer import AnswerReward

REWARD = AnswerReward()


def score(template: Any, stop_ids: frozenset[int], token_ids: Sequence[int], gold: str) -> float:
    """Returns the reward of a completion, its end token included."""
    ids = list(token_ids)
    stopped = bool(ids) and ids[-1] in stop_ids
    content = ids[:-1] if stopped else ids
    stopped = stopped and not template.special_tokens_in(content)
    item = RewardInput("", template.decode(content), gold, {}, stopped, len(ids))
    value = REWARD.score_one(item).value
    assert value is not None, "each prompt has a gold answer"
    return float(value)


@dataclass
class RewardClient:
    """The reward of our rollouts, computed in the process itself, so that its time is counted."""

    template: Any
    stop_ids: frozenset[int]
    scores: dict[int, list[float]] = field(default_factory=dict)

    def submit(self, key: int, prompt: Any, text: str, completion: Any) -> None:
        """Scores a completion."""
        self.scores[key] = [score(self.template, self.stop_ids, completion.token_ids, prompt.ground_truth)]

    def collect(self) -> Mapping[int, Sequence[float]]:
        """Returns the scores since the last call."""
        scores, self.scores = self.scores, {}
        return scores
