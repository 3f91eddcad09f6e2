"""What an answer is worth: right or wrong by a verifier or the gold answer, the recipe's rewards, and a reward model's
score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_tune.assembly.reward_model import REWARD_ROLE, append_end_of_turn, end_of_turn_ids, score_rows
from lowrank_tune.config import RecipeConfig, RewardConfig
from lowrank_tune.data import ChatTemplate
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation.heldout import is_exact
from lowrank_tune.evaluation.questions import EvalQuestion
from lowrank_tune.evaluation.target import REWARD_MODEL_ROLE
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.model.roles import Roles
from lowrank_tune.rewards import RewardInput, Score, WeightedReward, WorkerPool, build_rewards, row_rejection_reason
from lowrank_tune.rewards.reward_model import RewardModel
from lowrank_tune.rewards.verdicts import is_correct

MICRO_TOKENS = 1 << 14
GROUND_TRUTH = "gold answer"


@dataclass(frozen=True)
class GradedAnswer:
    """One answer: `right` None where nothing could tell, `reward` None where a reward failed or there are none, `parts`
    of it by name, the reward model's `score`. `stopped`: it ended by itself, within its turn. `failed`: which reward or
    verifier could not tell, and why."""

    text: str
    tokens: int
    stopped: bool
    right: bool | None
    reward: float | None
    parts: Mapping[str, float]
    score: float | None
    failed: str = ""


class Grader:
    """Marks answers while others are still written. Use it as a context manager: its workers end with it.

    `verifier` (a reward by name) says what is right; else every reward of the recipe that judges; else whether the gold
    answer was given. Raises UserError where a reward cannot be made.
    """

    def __init__(
        self,
        recipe: RecipeConfig | None,
        verifier: str | None,
        has_reward_model: bool,
        template: ChatTemplate,
    ) -> None:
        self.template = template
        if recipe is not None and recipe.rewards:
            rewards = build_rewards(recipe.rewards, Path.cwd())
        else:
            rewards = []
        self.rewards: list[WeightedReward] = rewards
        if verifier is not None:
            self.verifiers = build_rewards([RewardConfig(name=verifier)], Path.cwd())
        else:
            self.verifiers = [
                weighted_reward
                for weighted_reward in rewards
                if weighted_reward.is_verifier and not isinstance(weighted_reward.reward, RewardModel)
            ]
        if verifier is not None and not self.verifiers[0].is_verifier:
            raise UserError(f"--verifier: `{verifier}` does not tell right from wrong")
        self.has_reward_model = has_reward_model
        self._all = [
            *rewards,
            *(weighted_reward for weighted_reward in self.verifiers if weighted_reward not in rewards),
        ]
        self._reward_model = RewardModel(REWARD_MODEL_ROLE)
        self._recipe_reward_models = [
            weighted_reward.reward for weighted_reward in rewards if isinstance(weighted_reward.reward, RewardModel)
        ]
        if self._recipe_reward_models or has_reward_model:
            self._end = end_of_turn_ids(template)
        else:
            self._end = []
        self._items: dict[tuple[int, int], tuple[RewardInput, bool | None]] = {}
        self._scorer: WorkerPool[tuple[int, int]] = WorkerPool(
            [
                *(weighted_reward.reward for weighted_reward in self._all),
                *([self._reward_model] if has_reward_model else []),
            ]
        )

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self._scorer.close()

    @property
    def grader_name(self) -> str:
        """What tells right from wrong, in words."""
        return " and ".join(weighted_reward.name for weighted_reward in self.verifiers) or GROUND_TRUTH

    def has_verdicts(self, questions: Sequence[EvalQuestion]) -> bool:
        """Whether it can be told of any of these questions which answers are right."""
        return bool(self.verifiers) or any(question.ground_truth is not None for question in questions)

    def set_base_model(self, roles: Roles) -> None:
        """Gives the learned rewards the base to read with."""
        for reward, role in [
            *((reward_model, REWARD_ROLE) for reward_model in self._recipe_reward_models),
            (self._reward_model, REWARD_MODEL_ROLE),
        ]:
            reward.score_batch = lambda rows, role=role: score_rows(
                roles,
                rows,
                self.template.pad_id,
                MICRO_TOKENS,
                role,
            )

    def submit(self, key: tuple[int, int], question: EvalQuestion, completion: Completion) -> None:
        """Takes an answer, as soon as it is written."""
        if completion.finish_reason == "stop":
            body = completion.token_ids[:-1]
        else:
            body = completion.token_ids
        text = self.template.decode(body)
        stopped = completion.finish_reason == "stop" and not self.template.special_tokens_in(body)
        ids = (
            [*question.prompt_ids, *append_end_of_turn(completion.token_ids, self._end)]
            if self._recipe_reward_models or self.has_reward_model
            else ()
        )
        item = RewardInput(
            question.text,
            text,
            question.ground_truth,
            question.row,
            stopped,
            len(completion.token_ids),
            ids,
        )
        # what runs on and on has not answered
        if question.ground_truth is None:
            exact = None
        else:
            exact = stopped and is_exact(text, question.ground_truth)
        self._items[key] = item, exact
        self._scorer.submit(key, item)

    def collect(self) -> dict[tuple[int, int], GradedAnswer]:
        """Waits for the marks of all that was submitted."""
        results = self._scorer.collect()
        items = self._items
        self._items = {}
        return {key: self._grade(*items[key], scores) for key, scores in results.items()}

    def ungradable_reason(self, question: EvalQuestion) -> str | None:
        """Why a reward or a verifier cannot grade any answer to this question."""
        return row_rejection_reason(
            self._all, RewardInput(question.text, "", question.ground_truth, question.row, True, 1)
        )

    def _grade(self, item: RewardInput, exact: bool | None, scores: Sequence[Score]) -> GradedAnswer:
        scored = list(zip(self._all, scores, strict=False))  # the score of --reward-model, if there is one, is the last
        verdicts = [is_correct(score) for weighted_reward, score in scored if weighted_reward in self.verifiers]
        if not self.verifiers:
            right = exact
        elif False in verdicts:
            right = False
        elif None in verdicts:
            right = None
        else:
            right = True
        reward_values = {
            weighted_reward.name: (weighted_reward.weight, score.value)
            for weighted_reward, score in scored[: len(self.rewards)]
        }
        parts = {name: value for name, (_, value) in reward_values.items() if value is not None}
        if len(parts) == len(reward_values) > 0:
            total_reward = sum(reward_values[name][0] * value for name, value in parts.items())
        else:
            total_reward = None
        failure = next(
            (
                f"{weighted_reward.name}: {score.reason or score.verdict}"
                for weighted_reward, score in scored
                if score.value is None
            ),
            "",
        )
        return GradedAnswer(
            item.completion,
            item.tokens,
            item.stopped,
            right,
            total_reward,
            parts,
            scores[-1].value if self.has_reward_model else None,
            failure,
        )
