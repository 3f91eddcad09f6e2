"""The parts of an online algorithm that need no base: prompts, rewards on their workers, and a check of the rewards on
reference answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from lowrank_tune.algorithms.reward_failures import RewardFailure
from lowrank_tune.assembly.reward_model import append_end_of_turn, encode_answer, end_of_turn_ids, score_rows
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import ChatTemplate, PromptDataset, PromptExample, Report, load_prompts
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.events import Emit, LogMessage, warning
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.model.roles import Roles
from lowrank_tune.rewards import (
    RewardInput,
    Score,
    WeightedReward,
    WorkerPool,
    build_rewards,
    first_failure,
    make_negative_samples,
    row_rejection_reason,
    sanity_check_rewards,
)
from lowrank_tune.rewards.base import HasStatus
from lowrank_tune.rewards.reward_model import RewardModel

NUM_ROWS_CHECKED = 48
"""Number of reference answers that the rewards are checked on."""


def log_report(report: Report, emit: Emit) -> None:
    """Logs the lines of a data report; those about dropped rows are warnings."""
    for line in report.lines():
        emit(
            LogMessage(
                message=line,
                level="warning" if "; dropped " in line else "info",
            )
        )


def load_train_prompts(
    recipe: RecipeConfig,
    template: ChatTemplate,
    emit: Emit,
) -> PromptDataset:
    """Returns the prompts to draw completions for. Raises UserError if there are none."""
    prompts = load_prompts(
        recipe.data,
        template,
        recipe.seed,
        emit,
        needs_ground_truth=recipe.needs_ground_truth,
        unusable=make_row_check(recipe),
    )
    log_report(prompts.report, emit)
    return prompts


def make_row_check(recipe: RecipeConfig) -> Callable[[PromptExample], str | None]:
    """Returns a function that returns the reason why the rewards cannot use a row of the data, or None."""
    builtin_rewards = [reward for reward in recipe.rewards if not reward.is_custom]
    weighted: list[WeightedReward] = []
    if builtin_rewards:
        weighted = build_rewards(builtin_rewards, Path.cwd())

    def reason(example: PromptExample) -> str | None:
        return row_rejection_reason(
            weighted,
            RewardInput.of(
                example,
                "",
                True,
                1,
            ),
        )

    return reason


class RewardScorer:
    """The rewards of a recipe on their workers; the reward client of a rollout collector."""

    def __init__(self, recipe: RecipeConfig, template: ChatTemplate) -> None:
        """Raises UserError if a reward cannot be built."""
        self.weighted: list[WeightedReward] = build_rewards(recipe.rewards, Path.cwd())
        self.max_failure_rate = recipe.rollout.max_reward_failure_rate
        self.weights = [weighted_reward.weight for weighted_reward in self.weighted]
        self.template = template
        rewards = [weighted_reward.reward for weighted_reward in self.weighted]
        self.reward_models = [reward for reward in rewards if isinstance(reward, RewardModel)]
        self._end_ids = end_of_turn_ids(template) if self.reward_models else []
        self.scorer: WorkerPool[int] = WorkerPool(rewards)

    def set_base_model(self, roles: Roles, micro_tokens: int) -> None:
        """Gives the reward models the base that they are computed with."""
        for reward_model in self.reward_models:
            reward_model.score_batch = partial(
                score_rows,
                roles,
                pad_id=self.template.pad_id,
                micro_tokens=micro_tokens,
            )

    def submit(
        self,
        request_id: int,
        prompt: PromptExample,
        text: str,
        completion: Completion,
    ) -> None:
        """Begins to score a completion."""
        has_end = completion.finish_reason == "stop"
        stopped = has_end and not self.template.special_tokens_in(completion.content_ids)
        num_tokens = len(completion.token_ids)
        ids = []
        if self.reward_models:
            ids = [*prompt.input_ids, *append_end_of_turn(completion.token_ids, self._end_ids)]
        self.scorer.submit(
            request_id,
            RewardInput.of(
                prompt,
                text,
                stopped,
                num_tokens,
                ids,
            ),
        )

    def reference_item(self, prompt: PromptExample, text: str) -> RewardInput:
        """Returns an answer of the data as a completion that ended by itself."""
        answer_ids = encode_answer(self.template, text) if self.reward_models else []
        ids = [*prompt.input_ids, *answer_ids] if answer_ids else []
        return RewardInput.of(
            prompt,
            text,
            True,
            max(1, len(text) // 4),
            ids,
        )

    def collect(self) -> Mapping[int, Sequence[float] | RewardFailure]:
        """Waits for all submitted completions; returns a value for each reward, or the failure, by request id. Raises
        TrainingError if a reward with `on_error: stop` failed."""
        return {request_id: self._values(scores) for request_id, scores in self.scorer.collect().items()}

    def _values(self, scores: Sequence[Score]) -> list[float] | RewardFailure:
        failure = first_failure(self.weighted, scores)
        if failure is None:
            return [float(score.value) for score in scores if score.value is not None]
        reward, score = failure
        reason = score.reason or score.verdict
        if reward.on_error == "stop":
            raise TrainingError(f"rewards: {reason}")
        return RewardFailure(reward.name, "timeout" if score.verdict == "timeout" else "error", reason)

    def close(self) -> None:
        """Ends the workers."""
        self.scorer.close()


def check_reference_rewards(
    scorer: RewardScorer,
    prompts: PromptDataset,
    rewards_check: Literal["strict", "warn", "off"],
    seed: int,
    emit: Emit,
) -> None:
    """Scores reference answers and wrong ones. Raises UserError if the rewards do not separate them and
    `rewards_check` is strict; warns otherwise."""
    for weighted_reward in scorer.weighted:
        if isinstance(weighted_reward.reward, HasStatus):
            emit(LogMessage(message=weighted_reward.reward.status()))
    if rewards_check == "off":
        emit(LogMessage(message="rewards_check is off: the rewards were not tried on reference answers"))
        return
    answered = [prompt for prompt in prompts.examples if prompt.answer]
    if not answered:
        emit(warning("the rows have no reference answers, so the rewards were not tried on any"))
        return
    sample = random.Random(f"rewards-{seed}").sample(answered, min(NUM_ROWS_CHECKED, len(answered)))
    reference_items = [scorer.reference_item(prompt, str(prompt.answer)) for prompt in sample]
    wrong_items = make_negative_samples(reference_items, seed)
    if scorer.reward_models:
        prompt_of_row = {id(item.row): prompt for item, prompt in zip(reference_items, sample, strict=True)}
        wrong_items = [scorer.reference_item(prompt_of_row[id(item.row)], item.completion) for item in wrong_items]
    report = sanity_check_rewards(
        scorer.weighted,
        reference_items,
        wrong_items,
        scorer.scorer,
        scorer.max_failure_rate,
    )
    for line in report.lines():
        emit(LogMessage(message=line))
    fault = report.fault()
    if fault and rewards_check == "strict":
        raise UserError(fault)
    problem = fault or report.warning()
    if problem:
        emit(warning(problem))
