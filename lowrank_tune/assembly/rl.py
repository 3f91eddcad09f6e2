"""The components of an online algorithm: prompts, rewards on their workers, the rollout collector, and a check of the
rewards on reference answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from lowrank_tune.algorithms.context import AlgorithmContext
from lowrank_tune.algorithms.grpo import GRPO
from lowrank_tune.algorithms.ppo import PPO, CriticConfig, GAEConfig, KLControlConfig, UpdateConfig
from lowrank_tune.algorithms.reward_failures import RewardFailure, RewardFailureTracker
from lowrank_tune.algorithms.rollouts import RolloutBatch, RolloutCollector
from lowrank_tune.assembly.reward_model import append_end_of_turn, encode_answer, end_of_turn_ids, score_rows
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import ChatTemplate, PromptDataset, PromptExample, PromptSampler, load_prompts
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.events import Emit, GroupLogged, LogMessage
from lowrank_tune.functional import step_seed
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
from lowrank_tune.types import Completion

NUM_ROWS_CHECKED = 48  # reference answers that the rewards are tried on
ROLLOUT_SEED_TAG = 1 << 21  # differs from the tag of `reward_dry_run`, so that the two never share random numbers


def load_train_prompts(recipe: RecipeConfig, template: ChatTemplate, emit: Emit) -> PromptDataset:
    """The prompts to draw completions for. Raises UserError."""
    prompts = load_prompts(
        recipe.data,
        template,
        recipe.seed,
        emit,
        needs_ground_truth=recipe.needs_ground_truth,
        unusable=make_row_check(recipe),
    )
    for line in prompts.report.lines():
        emit(LogMessage(message=line, level="warning" if "; dropped " in line else "info"))
    return prompts


def make_row_check(recipe: RecipeConfig) -> Callable[[PromptExample], str | None]:
    """Of each row of the data, why no reward could judge by it."""
    builtin_rewards = [use for use in recipe.rewards if not is_user_function(use.name)]
    if builtin_rewards:
        weighted = build_rewards(builtin_rewards, Path.cwd())
    else:
        weighted = []
    return lambda prompt_example: row_rejection_reason(
        weighted, RewardInput(prompt_example.text, "", prompt_example.ground_truth, prompt_example.row, True, 1)
    )


class RewardScorer:
    """The recipe's rewards on their workers, for a rollout collector."""

    def __init__(self, recipe: RecipeConfig, template: ChatTemplate) -> None:
        self.weighted: list[WeightedReward] = build_rewards(recipe.rewards, Path.cwd())
        self.max_failure_rate = recipe.rollout.max_reward_failure_rate
        self.weights = [weighted_reward.weight for weighted_reward in self.weighted]
        self.template = template
        self.reward_models = [
            weighted_reward.reward
            for weighted_reward in self.weighted
            if isinstance(weighted_reward.reward, RewardModel)
        ]
        self._end_ids = end_of_turn_ids(template) if self.reward_models else []
        self.scorer: WorkerPool[int] = WorkerPool([weighted_reward.reward for weighted_reward in self.weighted])

    def submit(self, request_id: int, prompt: PromptExample, text: str, completion: Completion) -> None:
        stopped = completion.finish_reason == "stop" and not self.template.special_tokens_in(completion.token_ids[:-1])
        if self.reward_models:
            ids = [*prompt.input_ids, *append_end_of_turn(completion.token_ids, self._end_ids)]
        else:
            ids = []
        self.scorer.submit(
            request_id,
            RewardInput(prompt.text, text, prompt.ground_truth, prompt.row, stopped, len(completion.token_ids), ids),
        )

    def set_base_model(self, roles: Roles, micro_tokens: int) -> None:
        """Gives the learned rewards the base to read with."""
        for reward in self.reward_models:
            reward.score_batch = lambda rows: score_rows(roles, rows, self.template.pad_id, micro_tokens)

    def reference_item(self, prompt: PromptExample, text: str) -> RewardInput:
        """An answer that nobody drew, as if it had been: it ended by itself."""
        if self.reward_models:
            answer_tokens = encode_answer(self.template, text)
        else:
            answer_tokens = []
        return RewardInput(
            prompt.text,
            text,
            prompt.ground_truth,
            prompt.row,
            True,
            max(1, len(text) // 4),
            [*prompt.input_ids, *answer_tokens] if answer_tokens else (),
        )

    def collect(self) -> Mapping[int, Sequence[float] | RewardFailure]:
        return {key: self._values(scores) for key, scores in self.scorer.collect().items()}

    def _values(self, scores: Sequence[Score]) -> list[float] | RewardFailure:
        if (failure := first_failure(self.weighted, scores)) is None:
            return [float(score.value) for score in scores if score.value is not None]
        reward, score = failure
        if reward.on_error == "stop":
            raise TrainingError(f"rewards: {score.reason or score.verdict}")
        return RewardFailure(
            reward.name,
            "timeout" if score.verdict == "timeout" else "error",
            score.reason or score.verdict,
        )

    def close(self) -> None:
        self.scorer.close()


def check_reference_rewards(
    scorer: RewardScorer,
    prompts: PromptDataset,
    rewards_check: Literal["strict", "warn", "off"],
    seed: int,
    emit: Emit,
) -> None:
    """Tries the rewards on reference answers and on wrong ones. Raises UserError where they do not separate them and
    `rewards_check` is strict."""
    for reward in scorer.weighted:
        if isinstance(reward.reward, HasStatus):
            emit(LogMessage(message=reward.reward.status()))
    if rewards_check == "off":
        emit(LogMessage(message="rewards_check is off: the rewards were not tried on reference answers"))
        return
    answered = [prompt for prompt in prompts.examples if prompt.answer]
    if not answered:
        emit(
            LogMessage(
                message="the rows hold no reference answers, so the rewards were not tried on any", level="warning"
            )
        )
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
    if warning := fault or report.warning():
        emit(LogMessage(message=warning, level="warning"))


def make_rollout_collector(
    recipe: RecipeConfig,
    roles: Roles,
    template: ChatTemplate,
    prompts: PromptDataset,
    scorer: RewardScorer,
    stop_ids: frozenset[int],
    micro_tokens: int,
    emit: Emit,
) -> RolloutCollector:
    """Draws completions of the recipe's prompts, step by step."""
    sampler = PromptSampler(prompts, recipe.data, recipe.train, recipe.seed)
    config = recipe.rollout

    def prompts_of(step: int, draw: int, count: int | None) -> list[PromptExample]:
        if draw == 0:
            rows = sampler.rows(step)
        else:
            rows = sampler.replacement_prompts(step, draw, count or 1)
        return [prompts.examples[row] for row in rows]

    def log_group(step: int, rollout: RolloutBatch, advantages: Tensor) -> None:
        emit(
            GroupLogged(
                step=step + 1,
                prompt=rollout.prompts[0].text,
                ground_truth=rollout.prompts[0].ground_truth,
                completions=_completions(rollout, advantages),
            )
        )

    return RolloutCollector(
        roles,
        prompts_of,
        scorer,
        [reward.name for reward in scorer.weighted],
        scorer.weights,
        template.decode,
        stop_ids,
        template.pad_id,
        config.num_generations,
        config.max_new_tokens,
        config.temperature,
        config.max_num_seqs,
        micro_tokens,
        lambda number: step_seed(recipe.seed, ROLLOUT_SEED_TAG + number),
        log_group,
        RewardFailureTracker(config.max_reward_failure_rate),
    )


def _completions(rollout: RolloutBatch, advantages: Tensor) -> list[Mapping[str, object]]:
    """The first group, as the screen shows it."""
    n = rollout.rewards.shape[1]
    return [_completion(rollout, advantages, i) for i in range(n)]


def _completion(rollout: RolloutBatch, advantages: Tensor, i: int) -> Mapping[str, object]:
    record: dict[str, object] = {
        "text": rollout.texts[i],
        "finish_reason": "length" if bool(rollout.truncated[i]) else "stop",
    }
    if (failure := rollout.failed_rewards[i]) is not None:
        return record | {
            "reward": None,
            "advantage": None,
            "unscored": f"{failure.reward}: {failure.reason}",
            "parts": {},
        }
    return record | {
        "reward": float(rollout.rewards[0, i]),
        "advantage": float(advantages[0, i]),
        "parts": dict(zip(rollout.reward_names, rollout.reward_components[i].tolist(), strict=True)),
    }


def make_grpo(recipe: RecipeConfig, context: AlgorithmContext, collector: RolloutCollector) -> GRPO:
    """The algorithm of the recipe."""
    config = recipe.grpo
    epsilon_high = config.epsilon_high
    if epsilon_high is None and config.loss_type not in ("dapo", "cispo"):
        epsilon_high = config.epsilon
    return GRPO(
        context,
        collector,
        config.loss_type,
        config.epsilon,
        epsilon_high,
        config.beta,
        config.kl_in_reward,
        config.kl_estimator,
        config.num_iterations,
        config.old_logprobs_from,
        config.max_logprob_mismatch,
        config.truncated_completions,
        config.missing_eos_penalty,
        config.zero_std_groups,
    )


def make_ppo(recipe: RecipeConfig, context: AlgorithmContext, collector: RolloutCollector) -> PPO:
    """The algorithm of the recipe."""
    config = recipe.ppo
    critic = CriticConfig(config.vf_coef if config.critic == "shared" else 1.0, config.cliprange_value)
    return PPO(
        context,
        collector,
        critic,
        GAEConfig(config.gamma, config.lam, config.truncated_completions, config.missing_eos_penalty),
        KLControlConfig(config.kl_coef, config.kl_target, config.kl_gain, config.target_kl),
        UpdateConfig(
            config.cliprange,
            config.entropy,
            config.num_ppo_epochs,
            config.num_mini_batches,
            config.max_logprob_mismatch,
        ),
    )
