"""The parts of an online algorithm: prompts, rewards on their workers, the rollout collector, and a check of the
rewards on reference answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from lowrank_tune.algorithms.reward_failures import RewardFailure, RewardFailureTracker
from lowrank_tune.algorithms.rollouts import RolloutCollector, RolloutGroups
from lowrank_tune.assembly.reward_model import append_end_of_turn, encode_answer, end_of_turn_ids, score_rows
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import ChatTemplate, PromptDataset, PromptExample, PromptSampler, Report, load_prompts
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.events import Emit, GroupLogged, LogMessage
from lowrank_tune.functional import step_seed
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
from lowrank_tune.rewards.user_function import is_user_function

NUM_ROWS_CHECKED = 48
"""Number of reference answers that the rewards are checked on."""
ROLLOUT_SEED_TAG = 1 << 21
"""Differs from the tag of `reward_dry_run`, so that the two use different random numbers."""


def log_report(report: Report, emit: Emit) -> None:
    """Logs the lines of a data report; those about dropped rows are warnings."""
    for line in report.lines():
        emit(LogMessage(message=line, level="warning" if "; dropped " in line else "info"))


def load_train_prompts(recipe: RecipeConfig, template: ChatTemplate, emit: Emit) -> PromptDataset:
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
    builtin_rewards = [reward for reward in recipe.rewards if not is_user_function(reward.name)]
    weighted: list[WeightedReward] = []
    if builtin_rewards:
        weighted = build_rewards(builtin_rewards, Path.cwd())

    def reason(example: PromptExample) -> str | None:
        item = RewardInput(example.text, "", example.ground_truth, example.row, stopped=True, tokens=1)
        return row_rejection_reason(weighted, item)

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

    def submit(self, request_id: int, prompt: PromptExample, text: str, completion: Completion) -> None:
        """Begins to score a completion."""
        has_end = completion.finish_reason == "stop"
        item = RewardInput(
            prompt.text,
            text,
            prompt.ground_truth,
            prompt.row,
            stopped=has_end and not self.template.special_tokens_in(completion.content_ids),
            tokens=len(completion.token_ids),
            ids=self._model_input(prompt, append_end_of_turn(completion.token_ids, self._end_ids)),
        )
        self.scorer.submit(request_id, item)

    def reference_item(self, prompt: PromptExample, text: str) -> RewardInput:
        """Returns an answer of the data as a completion that ended by itself."""
        answer_ids = encode_answer(self.template, text) if self.reward_models else []
        return RewardInput(
            prompt.text,
            text,
            prompt.ground_truth,
            prompt.row,
            stopped=True,
            tokens=max(1, len(text) // 4),
            ids=self._model_input(prompt, answer_ids) if answer_ids else (),
        )

    def _model_input(self, prompt: PromptExample, answer_ids: Sequence[int]) -> list[int]:
        """Returns the token ids that the reward models read; none without reward models."""
        if not self.reward_models:
            return []
        return [*prompt.input_ids, *answer_ids]

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
        message = "the rows have no reference answers, so the rewards were not tried on any"
        emit(LogMessage(message=message, level="warning"))
        return
    sample = random.Random(f"rewards-{seed}").sample(answered, min(NUM_ROWS_CHECKED, len(answered)))
    reference_items = [scorer.reference_item(prompt, str(prompt.answer)) for prompt in sample]
    wrong_items = make_negative_samples(reference_items, seed)
    if scorer.reward_models:
        prompt_of_row = {id(item.row): prompt for item, prompt in zip(reference_items, sample, strict=True)}
        wrong_items = [scorer.reference_item(prompt_of_row[id(item.row)], item.completion) for item in wrong_items]
    report = sanity_check_rewards(scorer.weighted, reference_items, wrong_items, scorer.scorer, scorer.max_failure_rate)
    for line in report.lines():
        emit(LogMessage(message=line))
    fault = report.fault()
    if fault and rewards_check == "strict":
        raise UserError(fault)
    warning = fault or report.warning()
    if warning:
        emit(LogMessage(message=warning, level="warning"))


def make_rollout_collector(
    recipe: RecipeConfig,
    roles: Roles,
    template: ChatTemplate,
    prompts: PromptDataset,
    sampler: PromptSampler,
    scorer: RewardScorer,
    stop_ids: frozenset[int],
    micro_tokens: int,
    emit: Emit,
) -> RolloutCollector:
    """Returns the collector that draws completions of the recipe's prompts, step by step."""

    def prompts_of(step: int, draw: int, count: int | None) -> list[PromptExample]:
        if draw == 0:
            rows = sampler.rows(step)
        else:
            rows = sampler.replacement_prompts(step, draw, count or 1)
        return [prompts.examples[row] for row in rows]

    def log_group(step: int, groups: RolloutGroups, advantages: Tensor) -> None:
        prompt = groups.prompts[0]
        num_generations = groups.rewards.shape[1]
        emit(
            GroupLogged(
                step=step + 1,
                prompt=prompt.text,
                ground_truth=prompt.ground_truth,
                completions=[_completion_record(groups, advantages, sample) for sample in range(num_generations)],
            )
        )

    def seed_of(draw: int) -> int:
        return step_seed(recipe.seed, ROLLOUT_SEED_TAG + draw)

    config = recipe.rollout
    return RolloutCollector(
        roles=roles,
        prompts=prompts_of,
        reward_client=scorer,
        reward_names=[weighted_reward.name for weighted_reward in scorer.weighted],
        reward_weights=scorer.weights,
        decode=template.decode,
        stop_ids=stop_ids,
        pad_id=template.pad_id,
        num_generations=config.num_generations,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        max_num_seqs=config.max_num_seqs,
        micro_tokens=micro_tokens,
        seed_of=seed_of,
        log_group=log_group,
        failures=RewardFailureTracker(config.max_reward_failure_rate),
    )


def _completion_record(groups: RolloutGroups, advantages: Tensor, sample: int) -> Mapping[str, object]:
    """Returns a completion of the first group, for the event."""
    record: dict[str, object] = {
        "text": groups.texts[sample],
        "finish_reason": "length" if bool(groups.truncated[sample]) else "stop",
    }
    failure = groups.failed_rewards[sample]
    if failure is not None:
        record["reward"] = None
        record["advantage"] = None
        record["unscored"] = f"{failure.reward}: {failure.reason}"
        record["parts"] = {}
    else:
        components = groups.reward_components[sample].tolist()
        record["reward"] = float(groups.rewards[0, sample])
        record["advantage"] = float(advantages[0, sample])
        record["parts"] = dict(zip(groups.reward_names, components, strict=True))
    return record
