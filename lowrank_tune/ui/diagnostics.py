"""Diagnoses of a run: what its curves mean, in sentences with a cure. A function of the state alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from lowrank_tune.config.schema import ONLINE_ALGORITHMS
from lowrank_tune.training.reward_hacking import find_divergence
from lowrank_tune.ui.metrics import (
    PAIR_ACCURACY,
    PAIR_MARGIN,
)
from lowrank_tune.ui.reward_vs_accuracy import (
    describe_drift,
    eval_points_of,
    values_of,
)
from lowrank_tune.ui.state import State

MIN_STEPS = 20
"""Steps before which there is no diagnosis of a trend."""
RECENT_STEPS = 3
"""Steps whose mean is the current value of a statistic that is not compared with its past."""

# Loss and gradient.
MIN_LOSS_CHANGE = 0.02
"""Share of itself by which the loss must change to fall, or to rise."""
SMALL_LOSS = 0.01
"""A loss below it does not have to fall."""
HIGH_PAIR_ACCURACY = 0.9
"""Share of right pairs above which the loss does not have to fall."""
LEARNS_BY_LOSS = ("sft", "reward", "dpo")
EXPLODING_GRADIENT = 10.0
"""Times the usual gradient norm."""

# Size of the updates, as the training loop checks it.
MIN_UPDATED_FRACTION = 0.5
MIN_UPDATE_RATIO = 1e-8
MIN_LR_FRACTION = 0.01
CHECKS_BEFORE_WARNING = 3

# Validation.
MIN_VALIDATION_RISE = 0.02
"""Share of the best validation loss."""
EVALUATIONS_PAST_BEST = 3

# Distance from the reference, nats a token. SFT is meant to move away from its reference; an algorithm that optimizes a
# reward is not.
MAX_KL = {
    "sft": 5.0,
    "reward": 5.0,
    "dpo": 2.0,
    "grpo": 0.5,
    "ppo": 0.5,
}
KL_SETTINGS = {
    "dpo": "dpo.beta",
    "grpo": "grpo.beta",
    "ppo": "ppo.kl_coef",
}
ENTROPY_SETTINGS = {
    "grpo": "grpo.beta, grpo.epsilon_high",
    "ppo": "ppo.kl_coef, ppo.entropy",
}
CHOSEN_LOGP_DROP = -0.5
"""Equals `algorithms.dpo.CHOSEN_LOGP_DROP`, whose module loads torch."""

# Pairs, as shares of them.
CHANCE = 0.5
CHANCE_MARGIN = 0.05
SATURATED_ACCURACY = 0.98
MIN_ACCURACY_DROP = 0.05
"""Below the best validation."""
MAX_LENGTH_CORRELATION = 0.5

# Completions. Rewards are measured in shares of their span: the largest difference that was seen between rewards.
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
class Diagnosis:
    """A sentence and its severity."""

    level: Literal["good", "warning", "bad", ""]
    text: str


def diagnose(state: State) -> list[Diagnosis]:
    """Returns all diagnoses of a run, the most severe first; if there are none, that all is well or that it is too
    early."""
    diagnoses = [diagnosis for check in CHECKS for diagnosis in check(state)]
    diagnoses.sort(key=lambda diagnosis: ("bad", "warning").index(diagnosis.level))
    return diagnoses or [_no_issue(state)]


def _bad(text: str) -> Diagnosis:
    return Diagnosis("bad", text)


def _warning(text: str) -> Diagnosis:
    return Diagnosis("warning", text)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _change(first: float, last: float) -> str:
    return f"{_number(first)} at first, {_number(last)} now"


def _first_quarter(values: Sequence[float]) -> float:
    return fmean(values[: len(values) // 4])


def _last_quarter(values: Sequence[float]) -> float:
    return fmean(values[-(len(values) // 4) :])


def _recent(
    state: State,
    name: str,
    steps: int = RECENT_STEPS,
) -> float:
    """Returns the mean of a statistic over the last steps, nan without values."""
    values = values_of(state, name)
    return fmean(values[-steps:]) if values else math.nan


def _trained(state: State, name: str) -> float:
    """Returns the mean of a statistic over the last quarter of the steps, nan before `MIN_STEPS`."""
    values = values_of(state, name)
    return _last_quarter(values) if len(values) >= MIN_STEPS else math.nan


def not_finite(state: State) -> Iterator[Diagnosis]:
    for name, label in (("loss", "loss"), ("grad_norm", "grad norm")):
        last = state.last(name)
        if last is not None and not math.isfinite(last):
            yield _bad(f"{label} is not a number: the last step changed nothing")


def skipped_steps(state: State) -> Iterator[Diagnosis]:
    skipped = state.last("skipped_steps")
    if skipped:
        yield _warning(
            f"{skipped:.0f} of {state.step} steps had no finite loss or gradient and were skipped: "
            f"lower train.learning_rate"
        )


def loss_not_falling(state: State) -> Iterator[Diagnosis]:
    """Compares the first and the last quarter."""
    values = values_of(state, "loss")
    if len(values) < MIN_STEPS or state.algorithm not in LEARNS_BY_LOSS:
        return
    if state.algorithm in PAIR_ACCURACY and _trained(state, PAIR_ACCURACY[state.algorithm]) > HIGH_PAIR_ACCURACY:
        return
    first = _first_quarter(values)
    last = _last_quarter(values)
    if last <= max(first * (1 - MIN_LOSS_CHANGE), SMALL_LOSS):
        return
    change = f"{_change(first, last)}: check train.learning_rate and the data"
    if last > first * (1 + MIN_LOSS_CHANGE):
        yield _bad(f"the loss rises: {change}")
    else:
        yield _warning(f"the loss does not fall: {change}")


def gradient_exploding(state: State) -> Iterator[Diagnosis]:
    """Compares the last three norms with the median of all before; one high step alone is noise."""
    values = values_of(state, "grad_norm")
    if len(values) < MIN_STEPS:
        return
    usual = median(values[:-RECENT_STEPS])
    now = min(values[-RECENT_STEPS:])
    if usual > 0 and now > EXPLODING_GRADIENT * usual:
        yield _bad(
            f"the gradient norm explodes: {_number(now)}, {now / usual:.0f} times the usual: lower train.learning_rate"
        )


def kl_too_large(state: State) -> Iterator[Diagnosis]:
    kl = _recent(state, "kl")
    limit = MAX_KL.get(state.algorithm, MAX_KL["sft"])
    if kl > limit:
        advice = "lower train.learning_rate or train fewer steps"
        if state.algorithm in KL_SETTINGS:
            advice = f"raise {KL_SETTINGS[state.algorithm]} or lower train.learning_rate"
        yield _warning(f"KL to the reference is {_number(kl)} nats a token, above {_number(limit)}: {advice}")


def nothing_learned(state: State) -> Iterator[Diagnosis]:
    moved = values_of(state, "updated_param_fraction")
    sizes = values_of(state, "update_ratio")
    rates = values_of(state, "learning_rate")
    is_schedule_end = bool(rates) and rates[-1] < MIN_LR_FRACTION * max(rates)
    if len(moved) < CHECKS_BEFORE_WARNING or is_schedule_end:
        return
    few_moved = all(share < MIN_UPDATED_FRACTION for share in moved[-CHECKS_BEFORE_WARNING:])
    small_updates = all(size < MIN_UPDATE_RATIO for size in sizes[-CHECKS_BEFORE_WARNING:])
    if few_moved or small_updates:
        yield _bad(
            f"nothing is learned: the last step moved {moved[-1]:.1%} of the adapter: "
            f"check train.learning_rate and the loss mask"
        )


def validation_rising(state: State) -> Iterator[Diagnosis]:
    """Overfitting: every evaluation since the best is worse, and the last three clearly so on average."""
    series = state.series.get("eval_loss")
    points = [point for point in series.points if math.isfinite(point[1])] if series else []
    if not points:
        return
    best_step, best = min(points, key=lambda point: point[1])
    later = [value for step, value in points if step > best_step]
    if len(later) < EVALUATIONS_PAST_BEST:
        return
    now = fmean(later[-EVALUATIONS_PAST_BEST:])
    if now > best * (1 + MIN_VALIDATION_RISE):
        yield _warning(
            f"validation loss rises since step {best_step:.0f} ({best:.3f} -> {now:.3f}): overfitting; "
            f"step {best_step:.0f} has the lowest so far"
        )


def chosen_logps_drop(state: State) -> Iterator[Diagnosis]:
    """The collapse of DPO: the margin grows while both sides become less likely."""
    change = _recent(state, "logps/chosen_delta")
    if change < CHOSEN_LOGP_DROP:
        yield _bad(
            f"the chosen answers are unlearned: {_number(-change)} nats a token less likely than under the "
            "reference: raise dpo.beta, lower train.learning_rate, or set dpo.sft_coef"
        )


def rejected_preferred(state: State) -> Iterator[Diagnosis]:
    right = _pair_accuracy(state)
    if right < CHANCE - CHANCE_MARGIN:
        yield _bad(
            f"the rejected answers are preferred: {right:.0%} of the training pairs are right: "
            f"check with lowrank-tune data whether they are swapped"
        )


def pairs_not_separated(state: State) -> Iterator[Diagnosis]:
    right = _pair_accuracy(state)
    if not _is_chance(right):
        return
    margins = values_of(state, PAIR_MARGIN[state.algorithm])
    grows = len(margins) >= MIN_STEPS and _last_quarter(margins) > _first_quarter(margins)
    margin = "the margin grows slowly" if grows else "the margin does not grow"
    yield _warning(
        f"chosen and rejected are not separated: {right:.0%} of the training pairs are right, {margin}: "
        "a higher train.learning_rate, more steps, or pairs that differ more clearly"
    )


def heldout_pairs_not_separated(state: State) -> Iterator[Diagnosis]:
    """Held-out pairs decide for a reward model, because it can memorize its training pairs."""
    right = _pair_accuracy(state)
    if not right > CHANCE or _is_chance(right):
        return
    metric = f"eval_{PAIR_ACCURACY[state.algorithm]}"
    checked = _recent(state, metric)
    if len(values_of(state, metric)) > 1 and _is_chance(checked):
        yield _warning(
            f"held-out pairs are not separated: {checked:.0%} are right, in training {right:.0%}: "
            "more or clearer pairs, a smaller adapter, or fewer steps"
        )


def _pair_accuracy(state: State) -> float:
    """Returns the share of right training pairs, nan for an algorithm without pairs and before `MIN_STEPS`."""
    if state.algorithm not in PAIR_ACCURACY:
        return math.nan
    return _trained(state, PAIR_ACCURACY[state.algorithm])


def _is_chance(share: float) -> bool:
    return abs(share - CHANCE) <= CHANCE_MARGIN


def overconfident(state: State) -> Iterator[Diagnosis]:
    """A reward model that has memorized its training pairs becomes worse at others, with more confidence."""
    right = _trained(state, "accuracy")
    checked = values_of(state, "eval_accuracy")
    if state.algorithm != "reward" or len(checked) <= 2 or not right >= SATURATED_ACCURACY:
        return
    now = fmean(checked[-2:])
    if now < max(checked) - MIN_ACCURACY_DROP:
        yield _warning(
            f"the reward model is confident about its training pairs ({right:.0%} right) and worse at held-out ones "
            f"({max(checked):.0%} -> {now:.0%}): fewer steps, a lower train.learning_rate, or more pairs"
        )


def follows_length(state: State) -> Iterator[Diagnosis]:
    """A preference for long answers, the most frequent fault of reward models."""
    correlation = state.last("pairs/length_correlation")
    if correlation is None or not abs(correlation) > MAX_LENGTH_CORRELATION:
        return
    winner = "longer" if correlation > 0 else "shorter"
    advice = "balance the lengths in the data"
    if state.algorithm == "dpo":
        advice += ", or set dpo.loss_type=sigmoid_norm"
    yield _warning(
        f"the score follows the length of an answer (correlation {correlation:+.2f}): "
        f"{winner} ones win regardless of their content: {advice}"
    )


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


def _reward_trend(state: State) -> RewardTrend | None:
    """Returns the trend of the reward, None before `MIN_STEPS`."""
    values = values_of(state, "reward")
    if len(values) < MIN_STEPS:
        return None
    seen = state.reward_range or (min(values), max(values))
    span = max(seen[1] - seen[0], max(values) - min(values))
    return RewardTrend(
        _first_quarter(values),
        _last_quarter(values),
        span,
        max(*seen, *values),
    )


def _unsolved_trend(state: State) -> RewardTrend | None:
    """Returns the trend of a reward that is not near its highest value, None otherwise."""
    trend = _reward_trend(state)
    return None if trend is None or trend.is_near_top else trend


def reward_not_rising(state: State) -> Iterator[Diagnosis]:
    trend = _unsolved_trend(state)
    if trend is None or trend.span <= 0 or trend.last > trend.first + MIN_REWARD_RISE * trend.span:
        return
    change = _change(trend.first, trend.last)
    if trend.last < trend.first - REWARD_FALL * trend.span:
        setting = KL_SETTINGS.get(state.algorithm, "")
        yield _bad(f"the reward falls: {change}: lower train.learning_rate or raise {setting}")
    else:
        yield _warning(
            f"the reward does not rise: {change}: a higher train.learning_rate, larger groups, or an easier task"
        )


def entropy_collapsed(state: State) -> Iterator[Diagnosis]:
    """A policy that always writes the same cannot improve, unless its reward is near the highest already."""
    trend = _unsolved_trend(state)
    entropy = _trained(state, "entropy")
    if trend is None or not entropy < MIN_ENTROPY:
        return
    rewards = values_of(state, "reward")
    quarter = len(rewards) // 4
    before = fmean(rewards[-2 * quarter : -quarter])
    if trend.last <= before + MIN_REWARD_RISE * trend.span:
        settings = ENTROPY_SETTINGS.get(state.algorithm, "")
        yield _bad(
            f"entropy has collapsed to {_number(entropy)} nats a token while the reward stalls: "
            f"the completions are all alike: raise {settings} or rollout.temperature, or lower train.learning_rate"
        )


def mostly_truncated(state: State) -> Iterator[Diagnosis]:
    now = _recent(state, "completions/clipped_ratio", LENGTH_STEPS)
    if now > MAX_TRUNCATED:
        yield _warning(
            f"{now:.0%} of the completions are cut off by the limit{_length_growth(state)}: "
            f"raise rollout.max_new_tokens, or set {state.algorithm}.truncated_completions to penalize"
        )


def _length_growth(state: State) -> str:
    lengths = values_of(state, "completions/mean_length")
    if not lengths:
        return ""
    first = fmean(lengths[:LENGTH_STEPS])
    last = _recent(state, "completions/mean_length", LENGTH_STEPS)
    if last <= MIN_LENGTH_GROWTH * first:
        return ""
    return f", which grew from {_number(first)} to {_number(last)} tokens"


def rewards_all_equal(state: State) -> Iterator[Diagnosis]:
    trend = _unsolved_trend(state)
    if trend is not None and trend.span == 0:
        yield _bad(
            f"every completion has the reward {_number(trend.last)}, so there is nothing to learn: "
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
    zero_std = _trained(state, "frac_reward_zero_std")
    reward_std = _trained(state, "reward_std")
    if zero_std > MAX_ZERO_STD:
        yield _warning(
            f"{zero_std:.0%} of the groups have zero reward std: their completions give no gradient: {advice}"
        )
    elif reward_std < MIN_REWARD_STD * trend.span:
        yield _warning(f"rewards within a group hardly differ (spread {_number(reward_std)}): {advice}")


def sampling_mismatch(state: State) -> Iterator[Diagnosis]:
    """Sampling and training should compute the same log-prob; the run stops at `grpo.max_logprob_mismatch`."""
    difference = _recent(state, "sampling/sampling_logp_difference/mean")
    if difference > MAX_LOGPROB_MISMATCH:
        advice = "set grpo.old_logprobs_from to sampler, or " if state.algorithm == "grpo" else ""
        yield _warning(
            f"sampling and training disagree by {_number(difference)} nats a token: the importance ratios are "
            f"wrong: {advice}check the precision of the base"
        )


def reward_hacking(state: State) -> Iterator[Diagnosis]:
    """The reward rises while held-out answers get worse, by the rule of the run itself; and how the answers changed."""
    rewards = values_of(state, "reward")
    if not rewards:
        return
    divergence = find_divergence(eval_points_of(state), max(rewards) - min(rewards))
    if divergence is not None:
        yield _bad("; ".join([divergence.message, *describe_drift(state)]))


CHECKS: tuple[Callable[[State], Iterator[Diagnosis]], ...] = (
    not_finite,
    gradient_exploding,
    nothing_learned,
    chosen_logps_drop,
    rejected_preferred,
    pairs_not_separated,
    heldout_pairs_not_separated,
    loss_not_falling,
    overconfident,
    validation_rising,
    rewards_all_equal,
    groups_without_signal,
    entropy_collapsed,
    reward_not_rising,
    reward_hacking,
    mostly_truncated,
    sampling_mismatch,
    kl_too_large,
    follows_length,
    skipped_steps,
)


def _no_issue(state: State) -> Diagnosis:
    if state.ended is not None and state.ended.status == "failed":
        return Diagnosis("", "the run failed; see the last lines of the log")
    steps = len(values_of(state, "loss"))
    if steps == 0:
        return Diagnosis("", "no step yet: the curves begin with the first one")
    if steps < MIN_STEPS:
        return Diagnosis("", f"too early: {steps} of the first {MIN_STEPS} steps")
    trend = _reward_trend(state)
    if trend is not None and state.algorithm in ONLINE_ALGORITHMS:
        return Diagnosis("good", f"all good: {_reward_summary(state, trend)}")
    return Diagnosis("good", f"all good: {_loss_summary(state)}")


def _reward_summary(state: State, trend: RewardTrend) -> str:
    text = f"reward {_number(trend.first)} -> {_number(trend.last)}"
    accuracy = values_of(state, "heldout/accuracy")
    if len(accuracy) > 1:
        text += f", held-out exact {accuracy[0]:.0%} -> {accuracy[-1]:.0%}"
    return text


def _loss_summary(state: State) -> str:
    losses = values_of(state, "loss")
    text = f"loss {_number(_first_quarter(losses))} -> {_number(_last_quarter(losses))}"
    checked = values_of(state, "eval_loss")
    if len(checked) > 1:
        text += f", validation {_number(checked[0])} -> {_number(checked[-1])}"
    if state.algorithm not in PAIR_ACCURACY:
        return text
    metric = PAIR_ACCURACY[state.algorithm]
    heldout = values_of(state, f"eval_{metric}")
    trained = values_of(state, metric)
    if heldout:
        text += f", {heldout[-1]:.0%} of the held-out pairs right"
    elif trained:
        text += f", {trained[-1]:.0%} of the pairs right"
    return text
