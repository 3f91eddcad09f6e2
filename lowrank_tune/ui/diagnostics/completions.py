"""Checks of completions and their rewards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from lowrank_tune.training.reward_hacking import find_divergence
from lowrank_tune.ui.diagnostics.diagnosis import (
    KL_SETTINGS,
    MIN_STEPS,
    Diagnosis,
    bad,
    describe_change,
    first_quarter,
    last_quarter,
    recent_mean,
    short_number,
    trained_mean,
    warning,
)
from lowrank_tune.ui.reward_vs_accuracy import describe_drift, eval_points_of, values_of
from lowrank_tune.ui.state import State

ENTROPY_SETTINGS = {
    "grpo": "grpo.beta, grpo.epsilon_high",
    "ppo": "ppo.kl_coef, ppo.entropy",
}

# Rewards are measured in shares of their span: the largest difference that was seen between rewards.
MIN_ENTROPY = 0.02
"""Nats a token."""
MIN_REWARD_RISE = 0.02
REWARD_FALL = 0.1
NEAR_TOP = 0.9
MIN_REWARD_STD = 0.02
MAX_ZERO_STD = 0.8
"""Share of the groups."""
MAX_TRUNCATED = 0.2
"""Share of the completions."""
MIN_LENGTH_GROWTH = 1.2
LENGTH_STEPS = 5
MAX_LOGPROB_MISMATCH = 0.02
"""Nats a token."""


@dataclass(frozen=True)
class RewardTrend:
    """The reward over the steps. `span` is the largest difference that was seen between rewards."""

    first: float
    last: float
    span: float
    highest: float

    @property
    def is_near_top(self) -> bool:
        """Whether the mean reward is close to the highest one: then groups rightly differ little."""
        return self.span > 0 and self.last >= self.highest - (1 - NEAR_TOP) * self.span


def reward_trend(state: State) -> RewardTrend | None:
    """Returns the trend of the reward, None before `MIN_STEPS`."""
    values = values_of(state, "reward")
    if len(values) < MIN_STEPS:
        return None
    seen = state.reward_range or (min(values), max(values))
    span = max(seen[1] - seen[0], max(values) - min(values))
    return RewardTrend(
        first_quarter(values),
        last_quarter(values),
        span,
        max(*seen, *values),
    )


def _unsolved_trend(state: State) -> RewardTrend | None:
    """Returns the trend of a reward that is not near its highest value, None otherwise."""
    trend = reward_trend(state)
    return None if trend is None or trend.is_near_top else trend


def reward_not_rising(state: State) -> Iterator[Diagnosis]:
    trend = _unsolved_trend(state)
    if trend is None or trend.span <= 0 or trend.last > trend.first + MIN_REWARD_RISE * trend.span:
        return
    change = describe_change(trend.first, trend.last)
    if trend.last < trend.first - REWARD_FALL * trend.span:
        setting = KL_SETTINGS.get(state.algorithm, "")
        yield bad(f"the reward falls: {change}: lower train.learning_rate or raise {setting}")
    else:
        yield warning(
            f"the reward does not rise: {change}: a higher train.learning_rate, larger groups, or an easier task"
        )


def entropy_collapsed(state: State) -> Iterator[Diagnosis]:
    """A policy that always writes the same cannot improve, unless its reward is near the highest already."""
    trend = _unsolved_trend(state)
    entropy = trained_mean(state, "entropy")
    if trend is None or not entropy < MIN_ENTROPY:
        return
    rewards = values_of(state, "reward")
    quarter = len(rewards) // 4
    before = fmean(rewards[-2 * quarter : -quarter])
    if trend.last <= before + MIN_REWARD_RISE * trend.span:
        settings = ENTROPY_SETTINGS.get(state.algorithm, "")
        yield bad(
            f"entropy has collapsed to {short_number(entropy)} nats a token while the reward stalls: "
            f"the completions are all alike: raise {settings} or rollout.temperature, or lower train.learning_rate"
        )


def mostly_truncated(state: State) -> Iterator[Diagnosis]:
    now = recent_mean(state, "completions/clipped_ratio", LENGTH_STEPS)
    if now > MAX_TRUNCATED:
        yield warning(
            f"{now:.0%} of the completions are cut off by the limit{_length_growth(state)}: "
            f"raise rollout.max_new_tokens, or set {state.algorithm}.truncated_completions to penalize"
        )


def _length_growth(state: State) -> str:
    lengths = values_of(state, "completions/mean_length")
    if not lengths:
        return ""
    first = fmean(lengths[:LENGTH_STEPS])
    last = recent_mean(state, "completions/mean_length", LENGTH_STEPS)
    if last <= MIN_LENGTH_GROWTH * first:
        return ""
    return f", which grew from {short_number(first)} to {short_number(last)} tokens"


def rewards_all_equal(state: State) -> Iterator[Diagnosis]:
    trend = _unsolved_trend(state)
    if trend is not None and trend.span == 0:
        yield bad(
            f"every completion has the reward {short_number(trend.last)}, so there is nothing to learn: "
            "an easier task, a partial reward, or an SFT adapter below"
        )


def groups_without_signal(state: State) -> Iterator[Diagnosis]:
    """GRPO compares completions within a group: equal rewards give no gradient."""
    trend = _unsolved_trend(state)
    if state.algorithm != "grpo" or trend is None or trend.span == 0:
        return
    advice = (
        "raise rollout.num_generations or rollout.temperature, set grpo.zero_std_groups to resample, "
        "or begin from an SFT adapter"
    )
    zero_std = trained_mean(state, "frac_reward_zero_std")
    reward_std = trained_mean(state, "reward_std")
    if zero_std > MAX_ZERO_STD:
        yield warning(
            f"{zero_std:.0%} of the groups have zero reward std: their completions give no gradient: {advice}"
        )
    elif reward_std < MIN_REWARD_STD * trend.span:
        yield warning(f"rewards within a group hardly differ (spread {short_number(reward_std)}): {advice}")


def sampling_mismatch(state: State) -> Iterator[Diagnosis]:
    """Sampling and training should compute the same log-prob; the run stops at `grpo.max_logprob_mismatch`."""
    difference = recent_mean(state, "sampling/sampling_logp_difference/mean")
    if difference > MAX_LOGPROB_MISMATCH:
        advice = "set grpo.old_logprobs_from to sampler, or " if state.algorithm == "grpo" else ""
        yield warning(
            f"sampling and training disagree by {short_number(difference)} nats a token: the importance ratios are "
            f"wrong: {advice}check the precision of the base"
        )


def reward_hacking(state: State) -> Iterator[Diagnosis]:
    """The reward rises while held-out answers get worse, by the rule of the run itself; and how the answers changed."""
    rewards = values_of(state, "reward")
    if not rewards:
        return
    divergence = find_divergence(eval_points_of(state), max(rewards) - min(rewards))
    if divergence is not None:
        yield bad("; ".join([divergence.message, *describe_drift(state)]))
