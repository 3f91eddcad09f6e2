"""Reward and held-out accuracy of a run side by side, to detect reward hacking. Functions of the state alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from lowrank_tune.training.reward_hacking import (
    DEFAULT_STDERR,
    WINDOW,
    EvalPoint,
)
from lowrank_tune.ui.metrics import Point, Points
from lowrank_tune.ui.state import State

MIN_LENGTH_CHANGE = 1.3
"""Factor by which the mean length must grow or shrink."""
MIN_REPETITION_RISE = 0.1
"""Share of the sequences of four words."""


def eval_points_of(state: State) -> list[EvalPoint]:
    """Returns the evaluations of the held-out questions, that of the reference first. Each has the mean reward of the
    steps since the evaluation before."""
    rewards = _points(state, "reward")
    errors = dict(_points(state, "heldout_accuracy_stderr"))
    evals = list[EvalPoint]()
    before = state.heldout.get(state.reference_name(), {}).get("accuracy")
    if before is not None and rewards:
        evals.append(EvalPoint(0, rewards[0][1], before))
    last_step = 0.0
    for step, accuracy in _points(state, "heldout/accuracy"):
        since = [value for at, value in rewards if last_step < at <= step and math.isfinite(value)]
        if since:
            evals.append(
                EvalPoint(
                    int(step),
                    fmean(since),
                    accuracy,
                    errors.get(step, DEFAULT_STDERR),
                )
            )
            last_step = step
    return evals


def describe_drift(state: State) -> Iterator[str]:
    """Yields how length and repetition of the held-out answers changed; if those were not measured, of the
    completions."""
    lengths = values_of(state, "heldout/mean_length") or values_of(state, "completions/mean_length")
    if len(lengths) > WINDOW and lengths[0] > 0:
        first = lengths[0]
        now = fmean(lengths[-WINDOW:])
        if not 1 / MIN_LENGTH_CHANGE < now / first < MIN_LENGTH_CHANGE:
            change = "grew" if now > first else "shrank"
            yield f"answers {change} from {first:.3g} to {now:.3g} tokens"
    repeated = values_of(state, "heldout/repetition")
    if len(repeated) > WINDOW:
        first = repeated[0]
        now = fmean(repeated[-WINDOW:])
        if now > first + MIN_REPETITION_RISE:
            yield f"{now:.0%} of their word sequences come again, {first:.0%} at first"


def values_of(state: State, name: str) -> list[float]:
    """Returns the finite values of a statistic."""
    return [value for _, value in _points(state, name) if math.isfinite(value)]


def frontier(state: State, name: str = "reward") -> list[Point]:
    """Returns a statistic by the distance from the reference: (KL in nats a token, value). The KL is that of the same
    step; for another statistic than the reward it is the last one that was measured before."""
    return by_kl(
        _points(state, "kl"),
        _points(state, name),
        same_step=name == "reward",
    )


def by_kl(
    kl_by_step: Points,
    values_by_step: Points,
    same_step: bool = False,
) -> list[Point]:
    """Returns finite values with the last finite KL that was measured before them; with `same_step`, only those whose
    step has one. Both are in the order of the steps."""
    kl_points = [point for point in kl_by_step if math.isfinite(point[1])]
    points = list[Point]()
    index = 0
    for step, value in values_by_step:
        while index < len(kl_points) and kl_points[index][0] <= step:
            index += 1
        if index == 0 or not math.isfinite(value):
            continue
        kl_step, kl = kl_points[index - 1]
        if kl_step == step or not same_step:
            points.append((kl, value))
    return points


def _points(state: State, name: str) -> Points:
    return state.series[name].points if name in state.series else []
