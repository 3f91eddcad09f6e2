"""A diagnosis, and the figures of a run that its checks compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from lowrank_tune.ui.reward_vs_accuracy import values_of
from lowrank_tune.ui.state import State

MIN_STEPS = 20
"""Steps before which there is no diagnosis of a trend."""
RECENT_STEPS = 3
"""Points of a curve whose mean is the current value of a statistic that is not compared with its past. A point is a
step, in a long run several."""
KL_SETTINGS = {
    "dpo": "dpo.beta",
    "kto": "kto.beta",
    "grpo": "grpo.beta",
    "ppo": "ppo.kl_coef",
}
"""By algorithm: the setting that limits the distance from the reference."""


@dataclass(frozen=True)
class Diagnosis:
    """A sentence and its severity."""

    level: Literal["good", "warning", "bad", ""]
    text: str


def bad(text: str) -> Diagnosis:
    """Returns the diagnosis of a run that should be stopped or changed."""
    return Diagnosis("bad", text)


def warning(text: str) -> Diagnosis:
    """Returns the diagnosis of a fault that may disappear."""
    return Diagnosis("warning", text)


def short_number(value: float) -> str:
    """Returns a number in three digits."""
    return f"{value:.3g}"


def describe_change(first: float, last: float) -> str:
    """Returns `2.1 at first, 0.4 now`."""
    return f"{short_number(first)} at first, {short_number(last)} now"


def first_quarter(values: Sequence[float]) -> float:
    """Returns the mean of the first quarter of at least four values."""
    return fmean(values[: len(values) // 4])


def last_quarter(values: Sequence[float]) -> float:
    """Returns the mean of the last quarter of at least four values."""
    return fmean(values[-(len(values) // 4) :])


def recent_mean(
    state: State,
    name: str,
    points: int = RECENT_STEPS,
) -> float:
    """Returns the mean of the last points of a statistic, nan without values."""
    values = values_of(state, name)
    return fmean(values[-points:]) if values else math.nan


def trained_mean(state: State, name: str) -> float:
    """Returns the mean of a statistic over the last quarter of the steps, nan before `MIN_STEPS`."""
    values = values_of(state, name)
    return last_quarter(values) if len(values) >= MIN_STEPS else math.nan
