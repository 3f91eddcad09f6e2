"""Checks of loss, gradient, size of the updates, validation, and distance from the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, median

from lowrank_tune.ui.diagnostics.diagnosis import (
    KL_SETTINGS,
    MIN_STEPS,
    RECENT_STEPS,
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
from lowrank_tune.ui.metrics import PAIR_ACCURACY, kl_metric
from lowrank_tune.ui.reward_vs_accuracy import values_of
from lowrank_tune.ui.state import State

# Loss and gradient.
MIN_LOSS_CHANGE = 0.02
"""Share of itself by which the loss must change to fall, or to rise."""
SMALL_LOSS = 0.01
"""A loss below it does not have to fall."""
HIGH_PAIR_ACCURACY = 0.9
"""Share of right pairs above which the loss does not have to fall."""
LEARNS_BY_LOSS = ("sft", "reward", "dpo", "kto")
EXPLODING_GRADIENT = 10.0
"""Times the usual gradient norm."""
MAX_OVERFLOWED = 0.05
"""Share of steps whose gradient may exceed float16: the scale begins high, and is doubled now and then."""

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
    "kto": 2.0,
    "grpo": 0.5,
    "ppo": 0.5,
}


def not_finite(state: State) -> Iterator[Diagnosis]:
    for name, label in (("loss", "loss"), ("grad_norm", "grad norm")):
        last = state.last(name)
        if last is not None and not math.isfinite(last):
            yield bad(f"{label} is not a number: the last step changed nothing")


def skipped_steps(state: State) -> Iterator[Diagnosis]:
    skipped = state.last("skipped_steps")
    if skipped:
        yield warning(
            f"{skipped:.0f} of {state.step} steps had no finite loss or gradient and were skipped: "
            f"lower train.learning_rate"
        )


def overflowed_steps(state: State) -> Iterator[Diagnosis]:
    overflowed = state.last("overflowed_steps")
    if overflowed and overflowed > MAX_OVERFLOWED * max(state.step, MIN_STEPS):
        yield warning(
            f"{overflowed:.0f} of {state.step} steps exceeded float16 and were skipped: use a GPU with bfloat16, or "
            "base.dtype=float32"
        )


def loss_not_falling(state: State) -> Iterator[Diagnosis]:
    """Compares the first and the last quarter."""
    values = values_of(state, "loss")
    if len(values) < MIN_STEPS or state.algorithm not in LEARNS_BY_LOSS:
        return
    accuracy = "rewards/accuracies" if state.algorithm == "kto" else PAIR_ACCURACY.get(state.algorithm, "")
    if trained_mean(state, accuracy) > HIGH_PAIR_ACCURACY:
        return
    first = first_quarter(values)
    last = last_quarter(values)
    if last <= max(first * (1 - MIN_LOSS_CHANGE), SMALL_LOSS):
        return
    change = f"{describe_change(first, last)}: check train.learning_rate and the data"
    if last > first * (1 + MIN_LOSS_CHANGE):
        yield bad(f"the loss rises: {change}")
    else:
        yield warning(f"the loss does not fall: {change}")


def gradient_exploding(state: State) -> Iterator[Diagnosis]:
    """Compares the last three norms with the median of all before; one high step alone is noise."""
    values = values_of(state, "grad_norm")
    if len(values) < MIN_STEPS:
        return
    usual = median(values[:-RECENT_STEPS])
    now = min(values[-RECENT_STEPS:])
    if usual > 0 and now > EXPLODING_GRADIENT * usual:
        yield bad(
            f"the gradient norm explodes: {short_number(now)}, {now / usual:.0f} times the usual: "
            "lower train.learning_rate"
        )


def kl_too_large(state: State) -> Iterator[Diagnosis]:
    kl = recent_mean(state, kl_metric(state.algorithm))
    limit = MAX_KL.get(state.algorithm, MAX_KL["sft"])
    if kl > limit:
        advice = "lower train.learning_rate or train fewer steps"
        if state.algorithm in KL_SETTINGS:
            advice = f"raise {KL_SETTINGS[state.algorithm]} or lower train.learning_rate"
        yield warning(f"KL to the reference is {short_number(kl)} nats a token, above {short_number(limit)}: {advice}")


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
        yield bad(
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
        yield warning(
            f"validation loss rises since step {best_step:.0f} ({best:.3f} -> {now:.3f}): overfitting; "
            f"step {best_step:.0f} has the lowest so far"
        )
