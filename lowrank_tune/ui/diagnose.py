"""What the numbers mean, in sentences: the first thing that a person who does not read curves wants to know. Pure: state in, words out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from lowrank_tune.ui.state import State

FEW_STEPS = 20  # before that nothing is said about trends
NOT_FALLING = 0.02  # the loss has to lose this share of itself
EXPLODING = 10.0  # times the usual gradient norm
RISING, EVALUATIONS_PAST_BEST = 0.02, 3
FEW_MOVED, TINY_UPDATE, SMALL_RATE, LOOKS = 0.5, 1e-8, 0.01, 3  # as the loop's own watch
KL_BAND = {"sft": 5.0, "reward": 5.0, "dpo": 2.0, "grpo": 0.5, "ppo": 0.5}
"""Nats a token between policy and reference. SFT is meant to move away; what optimises a reward is not."""
LEARNS_BY_LOSS = ("sft", "reward", "dpo")


@dataclass(frozen=True)
class Diagnosis:
    """A sentence, and how bad it is."""

    level: Literal["good", "warning", "bad", ""]
    text: str


def diagnose(state: State) -> list[Diagnosis]:
    """All that can be said of a run, the worst first; or that all is well; or that it is too early."""
    found = [diagnosis for check in CHECKS for diagnosis in check(state)]
    found.sort(key=lambda diagnosis: ("bad", "warning").index(diagnosis.level))
    return found or [_well(state)]


def _values(state: State, name: str) -> list[float]:
    """The finite values of a statistic."""
    series = state.series.get(name)
    return [value for _, value in series.points if math.isfinite(value)] if series else []


def _number(value: float) -> str:
    return f"{value:.3g}"


def not_finite(state: State) -> Iterator[Diagnosis]:
    for name in ("loss", "grad_norm"):
        last = state.last(name)
        if last is not None and not math.isfinite(last):
            yield Diagnosis("bad", f"{name.replace('_', ' ')} is not a number: the last step changed nothing")


def bad_steps(state: State) -> Iterator[Diagnosis]:
    if bad := state.last("bad_steps"):
        yield Diagnosis("warning", f"{bad:.0f} of {state.step} steps had no finite loss or gradient and were skipped: a lower learning rate?")


def loss_not_falling(state: State) -> Iterator[Diagnosis]:
    """Compares the first and the last quarter; a loss that is almost 0 has nowhere to fall."""
    values = _values(state, "loss")
    if len(values) < FEW_STEPS or (state.started is not None and state.started.algorithm not in LEARNS_BY_LOSS):
        return
    quarter = len(values) // 4
    first, last = fmean(values[:quarter]), fmean(values[-quarter:])
    if last > first * (1 - NOT_FALLING) and last > 0.01:
        went = "rises" if last > first * (1 + NOT_FALLING) else "does not fall"
        told = f"the loss {went}: {_number(first)} at first, {_number(last)} now: is the learning rate right, and the data?"
        yield Diagnosis("bad" if went == "rises" else "warning", told)


def gradient_exploding(state: State) -> Iterator[Diagnosis]:
    """The last three norms against the median of all before: one high step is noise."""
    values = _values(state, "grad_norm")
    if len(values) < FEW_STEPS:
        return
    usual, now = median(values[:-3]), min(values[-3:])
    if usual > 0 and now > EXPLODING * usual:
        yield Diagnosis("bad", f"the gradient norm explodes: {_number(now)}, {now / usual:.0f} times the usual: lower train.learning_rate")


def kl_above_band(state: State) -> Iterator[Diagnosis]:
    values = _values(state, "kl")
    band = KL_BAND.get(state.started.algorithm if state.started else "sft", KL_BAND["sft"])
    if values and (now := fmean(values[-3:])) > band:
        yield Diagnosis("warning", f"KL to the reference is {_number(now)} nats a token, above {_number(band)}: the policy has gone far")


def nothing_learned(state: State) -> Iterator[Diagnosis]:
    moved, sizes, rates = (_values(state, name) for name in ("moved_share", "update_ratio", "learning_rate"))
    if len(moved) < LOOKS or (rates and rates[-1] < SMALL_RATE * max(rates)):
        return
    still = all(share < FEW_MOVED for share in moved[-LOOKS:]) or all(size < TINY_UPDATE for size in sizes[-LOOKS:])
    if still:
        yield Diagnosis("bad", f"nothing is learned: the last step moved {moved[-1]:.1%} of the adapter: train.learning_rate, the loss mask?")


def rows_dropped(state: State) -> Iterator[Diagnosis]:
    for said in state.warnings:
        if "; dropped " in said.text:
            yield Diagnosis("warning", f"rows were dropped: {said.text}")


def validation_rising(state: State) -> Iterator[Diagnosis]:
    """Overfitting: every evaluation since the best is worse than it, and the last three clearly so on average."""
    series = state.series.get("validation_loss")
    points = [point for point in series.points if math.isfinite(point[1])] if series else []
    if not points:
        return
    best = min(points, key=lambda point: point[1])
    later = [value for step, value in points if step > best[0]]
    if len(later) >= EVALUATIONS_PAST_BEST and (now := fmean(later[-EVALUATIONS_PAST_BEST:])) > best[1] * (1 + RISING):
        yield Diagnosis("warning", f"validation loss rises since step {best[0]:.0f} ({best[1]:.3f} -> {now:.3f}): overfitting; "
                                   f"step {best[0]:.0f} is kept as the best")  # fmt: skip


CHECKS: tuple[Callable[[State], Iterator[Diagnosis]], ...] = (
    not_finite, gradient_exploding, nothing_learned, loss_not_falling, validation_rising, kl_above_band, bad_steps, rows_dropped,
)  # fmt: skip


def _well(state: State) -> Diagnosis:
    if state.ended is not None and state.ended.status == "failed":
        return Diagnosis("", "the run failed; the last lines of the log say why")
    values, checked = _values(state, "loss"), _values(state, "validation_loss")
    if len(values) < FEW_STEPS:
        early = f"too early to judge: {len(values)} of the first {FEW_STEPS} steps"
        return Diagnosis("", early if values else "no step yet: the curves come with the first one")
    quarter = len(values) // 4
    told = f"loss {_number(fmean(values[:quarter]))} -> {_number(fmean(values[-quarter:]))}"
    if len(checked) > 1:
        told += f", validation {_number(checked[0])} -> {_number(checked[-1])}"
    return Diagnosis("good", f"all good: {told}")
