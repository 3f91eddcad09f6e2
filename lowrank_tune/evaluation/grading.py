"""Grades answers: right or wrong by a verifier or the gold answer, the rewards of a recipe, and the score of a reward
model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from lowrank_tune.assembly.reward_model import (
    REWARD_ROLE,
    append_end_of_turn,
    end_of_turn_ids,
    score_rows,
)
from lowrank_tune.config import RecipeConfig, RewardConfig
from lowrank_tune.data import ChatTemplate
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation.questions import EvalQuestion
from lowrank_tune.evaluation.target import REWARD_MODEL_ROLE
from lowrank_tune.generation.completion_text import decode_completion, has_stopped
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.model.roles import Roles
from lowrank_tune.rewards import (
    Reward,
    RewardInput,
    Score,
    WeightedReward,
    WorkerPool,
    build_rewards,
    row_rejection_reason,
    weighted_sum,
)
from lowrank_tune.rewards.reward_model import RewardModel
from lowrank_tune.rewards.verdicts import is_correct

MICRO_TOKENS = 1 << 14
"""Tokens per forward pass of an evaluation."""
GROUND_TRUTH = "gold answer"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MAX_DIGITS = 40

AnswerKey = tuple[int, int]
"""Number of the question, and of the sample."""


@dataclass(frozen=True)
class GradedAnswer:
    """One answer to the question at `prompt_index`.

    `stopped`: it ended by itself, within its turn. `right` is None without a gold answer, or if a verifier failed.
    `reward` is None without rewards, or if one failed; `parts` are its values by name. `score` is that of the reward
    model. `failed` states the first reward or verifier that failed, and why.
    """

    text: str
    tokens: int
    stopped: bool
    right: bool | None = None
    reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None
    failed: str = ""
    prompt_index: int = 0


def grade_answer(
    completion: Completion,
    question: EvalQuestion,
    template: ChatTemplate,
) -> GradedAnswer:
    """Grades a completion by the gold answer of its question. A completion that did not stop by itself is wrong."""
    text = decode_completion(completion, template)
    stopped = has_stopped(completion, template)
    right = None
    if question.ground_truth is not None:
        right = stopped and is_exact(text, question.ground_truth)
    return GradedAnswer(
        text,
        len(completion.token_ids),
        stopped,
        right,
        prompt_index=completion.prompt,
    )


def is_exact(text: str, ground_truth: str) -> bool:
    """Returns whether an answer is the gold answer: its last number is equal, or without a gold number the text is."""
    expected = _parse_float(ground_truth)
    if expected is None:
        return _normalize(text) == _normalize(ground_truth)
    numbers = _NUMBER.findall(text)
    if not numbers:
        return False
    last = _parse_float(numbers[-1])
    return last is not None and math.isclose(last, expected, rel_tol=0.0, abs_tol=1e-9)


def _normalize(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


def _parse_float(text: str) -> float | None:
    plain = text.strip().replace(",", "").rstrip(".")
    if len(plain) < _MAX_DIGITS and re.fullmatch(r"-?\d+(?:\.\d+)?", plain):
        return float(plain)
    return None


def all_verifiers_pass(scores: Sequence[Score]) -> bool | None:
    """Returns whether all verifiers accept an answer; None if one failed and no other rejects it."""
    verdicts = [is_correct(score) for score in scores]
    if False in verdicts:
        return False
    if None in verdicts:
        return None
    return True


def total_reward(weighted: Sequence[WeightedReward], scores: Sequence[Score]) -> float | None:
    """Returns the weighted sum of the scores of an answer; None without rewards, or if one has no value."""
    if not weighted:
        return None
    values = [score.value for score in scores]
    return weighted_sum(values, [reward.weight for reward in weighted])


def use_base_model(
    reward_model: RewardModel,
    roles: Roles,
    role: str,
    template: ChatTemplate,
) -> None:
    """Gives a learned reward the base that computes its scores."""
    reward_model.score_batch = partial(
        score_rows,
        roles,
        pad_id=template.pad_id,
        micro_tokens=MICRO_TOKENS,
        role=role,
    )


def reward_models_in(weighted: Sequence[WeightedReward]) -> list[RewardModel]:
    """Returns the learned rewards."""
    return [each.reward for each in weighted if isinstance(each.reward, RewardModel)]


class Grader:
    """Grades answers while others are still generated. Use it as a context manager, which ends its workers.

    An answer is right if `verifier` (the name of a reward) accepts it; without `verifier`, if all verifiers of the
    recipe do; without these, if it is the gold answer. Raises UserError if a reward cannot be built.
    """

    def __init__(
        self,
        recipe: RecipeConfig | None,
        verifier: str | None,
        has_reward_model: bool,
        template: ChatTemplate,
    ) -> None:
        self.template = template
        self.rewards: list[WeightedReward] = []
        if recipe is not None and recipe.rewards:
            self.rewards = build_rewards(recipe.rewards, Path.cwd())
        if verifier is not None:
            self.verifiers = _build_verifier(verifier)
        else:
            self.verifiers = [
                reward for reward in self.rewards if reward.is_verifier and not isinstance(reward.reward, RewardModel)
            ]
        self._weighted = list(self.rewards)
        for weighted_reward in self.verifiers:
            if weighted_reward not in self.rewards:
                self._weighted.append(weighted_reward)
        self._recipe_reward_models = reward_models_in(self.rewards)
        self._reward_model = RewardModel(REWARD_MODEL_ROLE) if has_reward_model else None
        self._end_ids: list[int] = []
        self._needs_ids = bool(self._recipe_reward_models) or has_reward_model
        if self._needs_ids:
            self._end_ids = end_of_turn_ids(template)
        self._answers: dict[AnswerKey, GradedAnswer] = {}
        rewards: list[Reward] = [weighted_reward.reward for weighted_reward in self._weighted]
        if self._reward_model is not None:
            rewards.append(self._reward_model)
        self._scorer: WorkerPool[AnswerKey] = WorkerPool(rewards)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self._scorer.close()

    @property
    def grader_name(self) -> str:
        """The verifiers by name, or that the gold answer decides."""
        return " and ".join(weighted_reward.name for weighted_reward in self.verifiers) or GROUND_TRUTH

    def has_verdicts(self, questions: Sequence[EvalQuestion]) -> bool:
        """Returns whether answers to any of these questions can be graded as right or wrong."""
        return bool(self.verifiers) or any(question.ground_truth is not None for question in questions)

    def set_base_model(self, roles: Roles) -> None:
        """Gives the learned rewards the loaded base."""
        for reward_model in self._recipe_reward_models:
            use_base_model(
                reward_model,
                roles,
                REWARD_ROLE,
                self.template,
            )
        if self._reward_model is not None:
            use_base_model(
                self._reward_model,
                roles,
                REWARD_MODEL_ROLE,
                self.template,
            )

    def submit(
        self,
        key: AnswerKey,
        question: EvalQuestion,
        completion: Completion,
    ) -> None:
        """Starts to grade an answer."""
        answer = grade_answer(completion, question, self.template)
        ids: list[int] = []
        if self._needs_ids:
            ids = [*question.prompt_ids, *append_end_of_turn(completion.token_ids, self._end_ids)]
        self._answers[key] = answer
        self._scorer.submit(
            key,
            RewardInput.of(
                question,
                answer.text,
                answer.stopped,
                answer.tokens,
                ids,
            ),
        )

    def collect(self) -> dict[AnswerKey, GradedAnswer]:
        """Waits for the grades of all submitted answers and returns them."""
        all_scores = self._scorer.collect()
        answers = self._answers
        self._answers = {}
        return {key: self._with_scores(answers[key], scores) for key, scores in all_scores.items()}

    def ungradable_reason(self, question: EvalQuestion) -> str | None:
        """Returns why a reward or a verifier cannot grade any answer to this question, None if all can."""
        return row_rejection_reason(
            self._weighted,
            RewardInput.of(
                question,
                "",
                True,
                1,
            ),
        )

    def _with_scores(
        self,
        answer: GradedAnswer,
        scores: Sequence[Score],
    ) -> GradedAnswer:
        """Adds the scores of the rewards, of further verifiers, and of --reward-model, in this order."""
        scored = list(zip(self._weighted, scores, strict=False))
        parts = {}
        failed = ""
        for weighted_reward, score in scored:
            if score.value is None:
                failed = failed or f"{weighted_reward.name}: {score.reason or score.verdict}"
            elif weighted_reward in self.rewards:
                parts[weighted_reward.name] = score.value
        right = answer.right
        if self.verifiers:
            right = all_verifiers_pass([score for reward, score in scored if reward in self.verifiers])
        return replace(
            answer,
            right=right,
            reward=total_reward(self.rewards, scores[: len(self.rewards)]),
            parts=parts,
            score=scores[-1].value if self._reward_model is not None else None,
            failed=failed,
        )


def _build_verifier(name: str) -> list[WeightedReward]:
    verifiers = build_rewards([RewardConfig(name=name)], Path.cwd())
    if not verifiers[0].is_verifier:
        raise UserError(f"--verifier: `{name}` is a shaping reward and does not decide what is right")
    return verifiers
