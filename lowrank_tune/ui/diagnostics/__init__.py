"""Diagnoses of a run: what its curves mean, in sentences with a cure. Functions of the state alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lowrank_tune.config.schema import ONLINE_ALGORITHMS
from lowrank_tune.ui.diagnostics.completions import (
    RewardTrend,
    entropy_collapsed,
    groups_without_signal,
    mostly_truncated,
    reward_hacking,
    reward_not_rising,
    reward_trend,
    rewards_all_equal,
    sampling_mismatch,
)
from lowrank_tune.ui.diagnostics.diagnosis import (
    MIN_STEPS,
    Diagnosis,
    first_quarter,
    last_quarter,
    short_number,
)
from lowrank_tune.ui.diagnostics.labels import (
    desirable_unlearned,
    kl_estimate_is_zero,
    labels_not_separated,
    one_class,
)
from lowrank_tune.ui.diagnostics.pairs import (
    chosen_logps_drop,
    follows_length,
    heldout_pairs_not_separated,
    overconfident,
    pairs_not_separated,
    rejected_preferred,
)
from lowrank_tune.ui.diagnostics.training import (
    gradient_exploding,
    kl_too_large,
    loss_not_falling,
    not_finite,
    nothing_learned,
    overflowed_steps,
    skipped_steps,
    validation_rising,
)
from lowrank_tune.ui.metrics import PAIR_ACCURACY
from lowrank_tune.ui.reward_vs_accuracy import values_of
from lowrank_tune.ui.state import State

__all__ = ["Diagnosis", "diagnose"]

CHECKS: tuple[Callable[[State], Iterator[Diagnosis]], ...] = (
    not_finite,
    gradient_exploding,
    nothing_learned,
    chosen_logps_drop,
    rejected_preferred,
    pairs_not_separated,
    heldout_pairs_not_separated,
    desirable_unlearned,
    one_class,
    labels_not_separated,
    kl_estimate_is_zero,
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
    overflowed_steps,
)


def diagnose(state: State) -> list[Diagnosis]:
    """Returns all diagnoses of a run, the most severe first; if there are none, that all is well or that it is too
    early."""
    diagnoses = [diagnosis for check in CHECKS for diagnosis in check(state)]
    diagnoses.sort(key=lambda diagnosis: ("bad", "warning").index(diagnosis.level))
    return diagnoses or [_no_issue(state)]


def _no_issue(state: State) -> Diagnosis:
    if state.ended is not None and state.ended.status == "failed":
        return Diagnosis("", "the run failed; see the last lines of the log")
    steps = len(values_of(state, "loss"))
    if steps == 0:
        return Diagnosis("", "no step yet: the curves begin with the first one")
    if steps < MIN_STEPS:
        return Diagnosis("", f"too early: {steps} of the first {MIN_STEPS} steps")
    trend = reward_trend(state)
    if trend is not None and state.algorithm in ONLINE_ALGORITHMS:
        return Diagnosis("good", f"all good: {_reward_summary(state, trend)}")
    return Diagnosis("good", f"all good: {_loss_summary(state)}")


def _reward_summary(state: State, trend: RewardTrend) -> str:
    text = f"reward {short_number(trend.first)} -> {short_number(trend.last)}"
    accuracy = values_of(state, "heldout/accuracy")
    if len(accuracy) > 1:
        text += f", held-out exact {accuracy[0]:.0%} -> {accuracy[-1]:.0%}"
    return text


def _loss_summary(state: State) -> str:
    losses = values_of(state, "loss")
    text = f"loss {short_number(first_quarter(losses))} -> {short_number(last_quarter(losses))}"
    checked = values_of(state, "eval_loss")
    if len(checked) > 1:
        text += f", validation {short_number(checked[0])} -> {short_number(checked[-1])}"
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
