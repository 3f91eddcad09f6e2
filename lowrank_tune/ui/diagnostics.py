"""What the numbers mean, in sentences: the first thing that a person who does not read curves wants to know. Pure:
state in, words out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from lowrank_tune.training.reward_hacking import find_divergence
from lowrank_tune.ui.metrics import GENERATIVE_ALGORITHMS, PAIR_ACCURACY, PAIR_MARGIN
from lowrank_tune.ui.reward_vs_accuracy import describe_drift, eval_points_of, values_of
from lowrank_tune.ui.state import State

FEW_STEPS = 20  # before that nothing is said about trends
NOT_FALLING = 0.02  # the loss has to lose this share of itself
EXPLODING = 10.0  # times the usual gradient norm
RISING = 0.02
EVALUATIONS_PAST_BEST = 3
# as the loop's own watch
MIN_UPDATED_FRACTION = 0.5
TINY_UPDATE = 1e-8
MIN_LR_FRACTION = 0.01
CHECKS_BEFORE_WARNING = 3
KL_BAND = {"sft": 5.0, "reward": 5.0, "dpo": 2.0, "grpo": 0.5, "ppo": 0.5}
"""Nats a token between policy and reference. SFT is meant to move away; what optimizes a reward is not."""
KL_ADVICE = {
    "dpo": "raise dpo.beta or lower train.learning_rate",
    "grpo": "raise grpo.beta or lower train.learning_rate",
    "ppo": "raise ppo.kl_coef or lower train.learning_rate",
}
KL_SETTINGS = {"grpo": "grpo.beta", "ppo": "ppo.kl_coef"}
ENTROPY_SETTINGS = {"grpo": "grpo.beta, grpo.epsilon_high", "ppo": "ppo.kl_coef, ppo.entropy"}
# nats of entropy; shares of the span of rewards: a rise, and near its top
MIN_ENTROPY = 0.02
MIN_REWARD_RISE = 0.02
NEAR_TOP = 0.9
# shares; of the span of rewards; nats a token
MAX_TRUNCATED = 0.2
MAX_ZERO_STD = 0.8
MIN_REWARD_STD = 0.02
MAX_LOGPROB_MISMATCH = 0.02
LEARNS_BY_LOSS = ("sft", "reward", "dpo")
COLLAPSED = -0.5
"""Nats a token that the chosen answers lost against the reference: as `algorithms.dpo` has it, which loads torch."""
# shares of pairs: from a coin's 0.5, of certainty, from the best validation
CHANCE_MARGIN = 0.05
SATURATED_ACCURACY = 0.98
MIN_ACCURACY_DROP = 0.05
FOLLOWS_LENGTH = 0.5


@dataclass(frozen=True)
class Diagnosis:
    """A sentence, and how bad it is."""

    level: Literal["good", "warning", "bad", ""]
    text: str


def diagnose(state: State) -> list[Diagnosis]:
    """All that can be said of a run, the worst first; or that all is well; or that it is too early."""
    diagnoses = [diagnosis for check in CHECKS for diagnosis in check(state)]
    diagnoses.sort(key=lambda diagnosis: ("bad", "warning").index(diagnosis.level))
    return diagnoses or [_no_issue(state)]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _algorithm(state: State) -> str:
    if state.started is not None:
        return state.started.algorithm
    return "sft"


def _mean_of_last_quarter(values: list[float]) -> float:
    """The mean of the last quarter, nan before there is enough to judge by."""
    if len(values) >= FEW_STEPS:
        return fmean(values[-(len(values) // 4) :])
    return math.nan


def not_finite(state: State) -> Iterator[Diagnosis]:
    for name in ("loss", "grad_norm"):
        last = state.last(name)
        if last is not None and not math.isfinite(last):
            yield Diagnosis("bad", f"{name.replace('_', ' ')} is not a number: the last step changed nothing")


def skipped_steps(state: State) -> Iterator[Diagnosis]:
    if bad := state.last("skipped_steps"):
        yield Diagnosis(
            "warning",
            f"{bad:.0f} of {state.step} steps had no finite loss or gradient and were skipped: a lower learning rate?",
        )


def loss_not_falling(state: State) -> Iterator[Diagnosis]:
    """Compares the first and the last quarter; a loss that is almost 0, or of pairs that are told apart already, has
    nowhere to fall."""
    values = values_of(state, "loss")
    algorithm = _algorithm(state)
    if len(values) < FEW_STEPS or algorithm not in LEARNS_BY_LOSS:
        return
    if algorithm in PAIR_ACCURACY and _mean_of_last_quarter(values_of(state, PAIR_ACCURACY[algorithm])) > 0.9:
        return
    quarter = len(values) // 4
    first = fmean(values[:quarter])
    last = fmean(values[-quarter:])
    if last > first * (1 - NOT_FALLING) and last > 0.01:
        went = "rises" if last > first * (1 + NOT_FALLING) else "does not fall"
        text = (
            f"the loss {went}: {_number(first)} at first, {_number(last)} now: is the learning rate right, and "
            f"the data?"
        )
        yield Diagnosis("bad" if went == "rises" else "warning", text)


def gradient_exploding(state: State) -> Iterator[Diagnosis]:
    """The last three norms against the median of all before: one high step is noise."""
    values = values_of(state, "grad_norm")
    if len(values) < FEW_STEPS:
        return
    usual = median(values[:-3])
    now = min(values[-3:])
    if usual > 0 and now > EXPLODING * usual:
        yield Diagnosis(
            "bad",
            f"the gradient norm explodes: {_number(now)}, {now / usual:.0f} times the usual: lower train.learning_rate",
        )


def kl_above_band(state: State) -> Iterator[Diagnosis]:
    values = values_of(state, "kl")
    advice = KL_ADVICE.get(_algorithm(state), "lower train.learning_rate or train fewer steps")
    band = KL_BAND.get(_algorithm(state), KL_BAND["sft"])
    if values and (now := fmean(values[-3:])) > band:
        yield Diagnosis(
            "warning",
            f"KL to the reference is {_number(now)} nats a token, above {_number(band)}: "
            f"the policy has gone far; {advice}",
        )


def nothing_learned(state: State) -> Iterator[Diagnosis]:
    moved, sizes, rates = (
        values_of(state, name) for name in ("updated_param_fraction", "update_ratio", "learning_rate")
    )
    if len(moved) < CHECKS_BEFORE_WARNING or (rates and rates[-1] < MIN_LR_FRACTION * max(rates)):
        return
    still = all(share < MIN_UPDATED_FRACTION for share in moved[-CHECKS_BEFORE_WARNING:]) or all(
        size < TINY_UPDATE for size in sizes[-CHECKS_BEFORE_WARNING:]
    )
    if still:
        yield Diagnosis(
            "bad",
            f"nothing is learned: the last step moved {moved[-1]:.1%} of the adapter: train.learning_rate, the loss "
            f"mask?",
        )


def rows_dropped(state: State) -> Iterator[Diagnosis]:
    for line in state.warnings:
        if "; dropped " in line.text:
            yield Diagnosis("warning", f"rows were dropped: {line.text}")


def validation_rising(state: State) -> Iterator[Diagnosis]:
    """Overfitting: every evaluation since the best is worse than it, and the last three clearly so on average."""
    series = state.series.get("eval_loss")
    if series:
        points = [point for point in series.points if math.isfinite(point[1])]
    else:
        points = []
    if not points:
        return
    best = min(points, key=lambda point: point[1])
    later = [value for step, value in points if step > best[0]]
    if len(later) >= EVALUATIONS_PAST_BEST and (now := fmean(later[-EVALUATIONS_PAST_BEST:])) > best[1] * (1 + RISING):
        yield Diagnosis(
            "warning",
            f"validation loss rises since step {best[0]:.0f} ({best[1]:.3f} -> {now:.3f}): overfitting; "
            f"step {best[0]:.0f} is kept as the best",
        )


def chosen_logps_drop(state: State) -> Iterator[Diagnosis]:
    """DPO's collapse: the margin grows while both sides become less likely."""
    values = values_of(state, "logps/chosen_delta")
    if values and (now := fmean(values[-3:])) < COLLAPSED:
        yield Diagnosis(
            "bad",
            f"the chosen answers are unlearned: {_number(-now)} nats a token less likely than under the reference: "
            "raise dpo.beta, lower train.learning_rate, or set dpo.sft_coef",
        )


def pair_accuracy_at_chance(state: State) -> Iterator[Diagnosis]:
    """A coin is right half of the time. Held-out pairs decide for a reward model, for it can learn its training pairs
    by heart."""
    algorithm = _algorithm(state)
    if algorithm not in PAIR_ACCURACY:
        return
    accuracy = PAIR_ACCURACY[algorithm]
    right, checked, margins = (
        values_of(state, name) for name in (accuracy, f"eval_{accuracy}", PAIR_MARGIN[algorithm])
    )
    trained = _mean_of_last_quarter(right)
    held_out = fmean(checked[-3:]) if len(checked) > 1 and len(right) >= FEW_STEPS else math.nan
    swapped = "are chosen and rejected swapped? see lowrank-tune data"
    if trained < 0.5 - CHANCE_MARGIN:
        yield Diagnosis("bad", f"the rejected answers win: {trained:.0%} of the training pairs are right: {swapped}")
    elif abs(trained - 0.5) <= CHANCE_MARGIN:
        grows = len(margins) >= FEW_STEPS and _mean_of_last_quarter(margins) > fmean(margins[: len(margins) // 4])
        if grows:
            margin_note = "the margin grows slowly"
        else:
            margin_note = "the margin does not grow"
        yield Diagnosis(
            "warning",
            f"chosen and rejected are not told apart: {trained:.0%} of the training pairs are right, {margin_note}: "
            "a higher train.learning_rate, more steps, or pairs that differ more clearly",
        )
    elif abs(held_out - 0.5) <= CHANCE_MARGIN:
        yield Diagnosis(
            "warning",
            f"held-out pairs are not told apart: {held_out:.0%} are right, in training {trained:.0%}: "
            "more or clearer pairs, a smaller adapter, or fewer steps",
        )


def overconfident(state: State) -> Iterator[Diagnosis]:
    """A reward model that knows its training pairs by heart becomes worse at others, and surer of it."""
    trained = _mean_of_last_quarter(values_of(state, "accuracy"))
    checked = values_of(state, "eval_accuracy")
    if (
        _algorithm(state) == "reward"
        and trained >= SATURATED_ACCURACY
        and len(checked) > 2
        and (now := fmean(checked[-2:])) < max(checked) - MIN_ACCURACY_DROP
    ):
        yield Diagnosis(
            "warning",
            f"the reward model is sure of its training pairs ({trained:.0%} right) and worse at held-out ones "
            f"({max(checked):.0%} -> {now:.0%}): fewer steps, a lower train.learning_rate, or more pairs",
        )


def follows_length(state: State) -> Iterator[Diagnosis]:
    """A preference for long answers is the fault that reward models learn most easily."""
    series = state.series.get("pairs/length_correlation")
    if series is not None and abs(series.last) > FOLLOWS_LENGTH:
        longer = "longer" if series.last > 0 else "shorter"
        advice = "balance the lengths in the data" + (
            ", or set dpo.loss_type=sigmoid_norm" if _algorithm(state) == "dpo" else ""
        )
        yield Diagnosis(
            "warning",
            f"the score follows the length of an answer (correlation {series.last:+.2f}): "
            f"{longer} ones win whatever they say: {advice}",
        )


def _reward_trend(state: State) -> tuple[float, float, float] | None:
    """The reward of the first and of the last quarter, and the span of what can be earned as far as it was seen; None
    before there is enough to judge by."""
    values = values_of(state, "reward")
    if len(values) < FEW_STEPS:
        return None
    quarter = len(values) // 4
    lowest, highest = state.reward_range or (min(values), max(values))
    return fmean(values[:quarter]), fmean(values[-quarter:]), max(highest - lowest, max(values) - min(values))


def _is_near_top(state: State) -> bool:
    """Whether almost all that a completion of a group ever earned is earned on average: then little variety is left,
    and rightly so."""
    trend = _reward_trend(state)
    values = values_of(state, "reward")
    if trend is None:
        return False
    _, last, span = trend
    highest = max([*values, *(state.reward_range or ())])
    return span > 0 and last >= highest - (1 - NEAR_TOP) * span


def reward_not_rising(state: State) -> Iterator[Diagnosis]:
    if (trend := _reward_trend(state)) is None or _is_near_top(state):
        return
    first, last, span = trend
    if span > 0 and last <= first + MIN_REWARD_RISE * span:
        falls = last < first - 0.1 * span
        went = "the reward falls" if falls else "the reward does not rise"
        falling = f"lower train.learning_rate or raise {KL_SETTINGS.get(_algorithm(state), '')}"
        if falls:
            advice = falling
        else:
            advice = "a higher train.learning_rate, larger groups, or an easier task"
        yield Diagnosis(
            "bad" if falls else "warning", f"{went}: {_number(first)} at first, {_number(last)} now: {advice}"
        )


def entropy_collapsed(state: State) -> Iterator[Diagnosis]:
    """A policy that always says the same has nothing to choose from; where it earns almost everything that is as it
    should be."""
    values = values_of(state, "entropy")
    rewards = values_of(state, "reward")
    if len(rewards) < FEW_STEPS or not (now := _mean_of_last_quarter(values)) < MIN_ENTROPY or _is_near_top(state):
        return
    quarter = len(rewards) // 4
    trend = _reward_trend(state)
    if (
        trend is not None
        and fmean(rewards[-quarter:]) <= fmean(rewards[-2 * quarter : -quarter]) + MIN_REWARD_RISE * trend[2]
    ):
        yield Diagnosis(
            "bad",
            f"entropy has collapsed to {_number(now)} nats a token while the reward stalls: the policy tries nothing "
            f"new: "
            f"raise {ENTROPY_SETTINGS.get(_algorithm(state), '')} or rollout.temperature, or lower "
            "train.learning_rate",
        )


def mostly_truncated(state: State) -> Iterator[Diagnosis]:
    """Completions that run into the limit, more of them as they grow."""
    shares = values_of(state, "completions/clipped_ratio")
    lengths = values_of(state, "completions/mean_length")
    if not shares or (now := fmean(shares[-5:])) <= MAX_TRUNCATED:
        return
    if lengths:
        first, last = (fmean(lengths[:5]), fmean(lengths[-5:]))
    else:
        first, last = (0.0, 0.0)
    if last > 1.2 * first:
        grown = f", which grew from {_number(first)} to {_number(last)} tokens"
    else:
        grown = ""
    yield Diagnosis(
        "warning",
        f"{now:.0%} of the completions are cut off by the limit{grown}: raise rollout.max_new_tokens, "
        f"or set {_algorithm(state)}.truncated_completions to penalize",
    )


def no_signal(state: State) -> Iterator[Diagnosis]:
    """Groups in which all earn the same. At the top that is success."""
    zero_std = _mean_of_last_quarter(values_of(state, "frac_reward_zero_std"))
    reward_std = _mean_of_last_quarter(values_of(state, "reward_std"))
    trend = _reward_trend(state)
    if trend is None or _is_near_top(state):
        return
    advice = (
        "raise rollout.num_generations or rollout.temperature, set grpo.zero_std_groups to resample, or begin from an "
        "SFT adapter"
    )
    if trend[2] == 0:
        yield Diagnosis(
            "bad",
            f"every completion has the reward {_number(trend[1])}, so that there is nothing to learn: an easier task, "
            "a partial reward, or an SFT adapter below",
        )
    elif _algorithm(state) != "grpo":
        return  # nothing is compared within a group
    elif zero_std > MAX_ZERO_STD:
        yield Diagnosis(
            "warning",
            f"{zero_std:.0%} of the groups have zero reward std: their completions all have one reward and give no "
            f"gradient: {advice}",
        )
    elif reward_std < MIN_REWARD_STD * trend[2]:
        yield Diagnosis("warning", f"rewards within a group hardly differ (spread {_number(reward_std)}): {advice}")


def sampling_mismatch(state: State) -> Iterator[Diagnosis]:
    """Sampling and training should give a token the same log-prob; the run stops at grpo.max_logprob_mismatch."""
    values = values_of(state, "sampling/sampling_logp_difference/mean")
    if values and (now := fmean(values[-3:])) > MAX_LOGPROB_MISMATCH:
        if _algorithm(state) == "grpo":
            advice = "set grpo.old_logprobs_from to sampler, or "
        else:
            advice = ""
        yield Diagnosis(
            "warning",
            f"sampling and training disagree by {_number(now)} nats a token: ratios compare what was never drawn: "
            f"{advice}look at the precision of the base",
        )


def reward_hacking(state: State) -> Iterator[Diagnosis]:
    """The reward rises while held-out answers get worse: the rule by which the run itself judges, and what has changed
    in the answers."""
    rewards = values_of(state, "reward")
    if rewards:
        divergence = find_divergence(eval_points_of(state), max(rewards) - min(rewards))
    else:
        divergence = None
    if divergence is not None:
        yield Diagnosis("bad", "; ".join([divergence.message, *describe_drift(state)]))


CHECKS: tuple[Callable[[State], Iterator[Diagnosis]], ...] = (
    not_finite,
    gradient_exploding,
    nothing_learned,
    chosen_logps_drop,
    pair_accuracy_at_chance,
    loss_not_falling,
    overconfident,
    validation_rising,
    no_signal,
    entropy_collapsed,
    reward_not_rising,
    reward_hacking,
    mostly_truncated,
    sampling_mismatch,
    kl_above_band,
    follows_length,
    skipped_steps,
    rows_dropped,
)


def _no_issue(state: State) -> Diagnosis:
    if state.ended is not None and state.ended.status == "failed":
        return Diagnosis("", "the run failed; the last lines of the log say why")
    values = values_of(state, "loss")
    checked = values_of(state, "eval_loss")
    if len(values) < FEW_STEPS:
        early = f"too early to judge: {len(values)} of the first {FEW_STEPS} steps"
        return Diagnosis("", early if values else "no step yet: the curves come with the first one")
    if (trend := _reward_trend(state)) is not None and _algorithm(state) in GENERATIVE_ALGORITHMS:
        accuracy = values_of(state, "heldout/accuracy")
        if len(accuracy) > 1:
            text = f", held-out exact {accuracy[0]:.0%} -> {accuracy[-1]:.0%}"
        else:
            text = ""
        return Diagnosis("good", f"all good: reward {_number(trend[0])} -> {_number(trend[1])}{text}")
    quarter = len(values) // 4
    text = f"loss {_number(fmean(values[:quarter]))} -> {_number(fmean(values[-quarter:]))}"
    if len(checked) > 1:
        text += f", validation {_number(checked[0])} -> {_number(checked[-1])}"
    if metric := PAIR_ACCURACY.get(_algorithm(state)):
        heldout_accuracy = values_of(state, f"eval_{metric}")
        accuracy = heldout_accuracy or values_of(state, metric)
        if accuracy:
            text += f", {accuracy[-1]:.0%} of the {'held-out ' if heldout_accuracy else ''}pairs right"
    return Diagnosis("good", f"all good: {text}")
