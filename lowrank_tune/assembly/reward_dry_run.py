"""Rewards of a few completions before the first step of GRPO: an estimate of how many groups will have no signal."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from lowrank_tune.algorithms.reward_failures import RewardFailure, summarize_failures
from lowrank_tune.assembly.rl import RewardScorer
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import ChatTemplate, PromptDataset, PromptExample
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage, ProgressBar, warning
from lowrank_tune.functional import step_seed, weighted_sum
from lowrank_tune.generation import Engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.roles import Roles
from lowrank_tune.rewards import zero_std_fraction

NUM_PROMPTS = 16
NUM_COMPLETIONS = 4
"""Completions of each prompt."""
SEED_TAG = 1 << 20
"""Differs from the tag of rollouts, so that the two use different random numbers."""
MAX_ZERO_STD_SHARE = 0.6
"""A higher estimate is logged as a warning."""


def dry_run_rewards(
    recipe: RecipeConfig,
    roles: Roles,
    template: ChatTemplate,
    prompts: PromptDataset,
    scorer: RewardScorer,
    stop_ids: frozenset[int],
    emit: Emit,
) -> None:
    """Generates completions of a few prompts, scores them and logs the expected share of groups with zero reward std.
    Raises UserError if no completion could be scored."""
    num_prompts = min(NUM_PROMPTS, len(prompts.examples))
    sampled_prompts = random.Random(f"trial-{recipe.seed}").sample(prompts.examples, num_prompts)
    rollout = recipe.rollout
    sampling = SamplingParams(
        rollout.max_new_tokens,
        stop_ids,
        rollout.temperature,
        step_seed(recipe.seed, SEED_TAG),
    )
    engine = Engine(roles, "policy", rollout.max_num_seqs)
    _submit_completions(
        engine,
        sampled_prompts,
        sampling,
        template,
        scorer,
        emit,
    )
    rewards = weighted_rewards(scorer, emit)
    emit(describe_rewards(rewards, num_prompts, rollout.num_generations))


def _submit_completions(
    engine: Engine,
    prompts: Sequence[PromptExample],
    sampling: SamplingParams,
    template: ChatTemplate,
    scorer: RewardScorer,
    emit: Emit,
) -> None:
    """Generates completions and submits each under the request id `prompt * NUM_COMPLETIONS + sample`."""
    bar = ProgressBar(
        "trying a few prompts",
        len(prompts) * NUM_COMPLETIONS,
        emit,
        updates=len(prompts),
    )
    completions = engine.generate([prompt.input_ids for prompt in prompts], NUM_COMPLETIONS, sampling)
    for completion in completions:
        request_id = completion.prompt * NUM_COMPLETIONS + completion.sample
        text = template.decode(completion.content_ids)
        scorer.submit(
            request_id,
            prompts[completion.prompt],
            text,
            completion,
        )
        bar.advance()


def weighted_rewards(scorer: RewardScorer, emit: Emit) -> dict[int, float]:
    """Returns the weighted sum of the rewards by request id, without the completions that could not be scored. Raises
    UserError if that leaves none."""
    scores = scorer.collect()
    failures = []
    rewards = {}
    for request_id, values in scores.items():
        if isinstance(values, RewardFailure):
            failures.append(values)
        else:
            rewards[request_id] = weighted_sum(values, scorer.weights)
    if not rewards:
        raise UserError(
            f"rewards: none of {len(scores)} trial completions could be scored: {summarize_failures(failures)}"
        )
    if failures:
        message = f"{len(failures)} of {len(scores)} trial completions could not be scored: "
        emit(warning(message + summarize_failures(failures)))
    return rewards


def describe_rewards(
    rewards: Mapping[int, float],
    num_prompts: int,
    num_generations: int,
) -> LogMessage:
    """Returns a message with the expected share of groups of `num_generations` completions with zero reward std. A
    completion passes if its reward is above the middle between the highest and the lowest."""
    highest = max(rewards.values())
    lowest = min(rewards.values())
    if highest - lowest <= 1e-6:
        message = (
            f"{len(rewards)} completions of {num_prompts} prompts all have reward {highest:.3g}: such groups have no "
            "signal; an easier task, a partial reward or an SFT adapter below would give one"
        )
        return warning(message)
    threshold = (highest + lowest) / 2
    rates = _pass_rates(rewards, threshold)
    zero_std_share = zero_std_fraction(rates, num_generations, NUM_COMPLETIONS)
    message = (
        f"{sum(rates) / len(rates):.0%} of {len(rewards)} trial completions have a reward above {threshold:.3g}: "
        f"about {zero_std_share:.0%} of groups of {num_generations} will have zero reward std"
    )
    return LogMessage(
        message=message,
        level="warning" if zero_std_share > MAX_ZERO_STD_SHARE else "info",
    )


def _pass_rates(rewards: Mapping[int, float], threshold: float) -> list[float]:
    """Returns the share of completions above `threshold`, for each prompt with a scored completion."""
    passed_by_prompt: dict[int, list[bool]] = {}
    for request_id, reward in sorted(rewards.items()):
        passed_by_prompt.setdefault(request_id // NUM_COMPLETIONS, []).append(reward > threshold)
    return [sum(passed) / len(passed) for passed in passed_by_prompt.values()]
