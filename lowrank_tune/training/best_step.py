"""Which step becomes `final/`: an earlier one only if it is better than the last by more than noise.

A step replaces the best one so far, and the best one replaces the last, only if the mean of the paired differences of
all validation rows, pairs or questions is larger than its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_tune.evaluation.unit_scores import (
    MIN_UNITS,
    Evaluation,
    PairedDifference,
    UnitScores,
    paired_difference,
)
from lowrank_tune.training.checkpointer import BestCheckpoint

METRIC_NAMES = {"accuracy": "held-out accuracy", "loss": "validation loss"}
BEST_IS = {"accuracy": "highest", "loss": "lowest"}
BETTER_IS = {"accuracy": "higher", "loss": "lower"}


@dataclass(frozen=True)
class Measured:
    """An evaluation of a step by the metric that selects the best one; a higher `score` is better."""

    step: int
    score: float
    evaluation: Evaluation


def update_best(best: BestCheckpoint, measured: Measured) -> bool:
    """Stores the evaluation as that of the last step, and as the best one if it is. Returns whether it is."""
    units = measured.evaluation.units
    difference = _difference(best, units)
    best.last = {
        "step": measured.step,
        "metrics": measured.evaluation.metrics,
        "units": "" if units is None else units.name,
        "is_finite": math.isfinite(measured.score),
        "difference": None if difference is None else vars(difference),
    }
    if not math.isfinite(measured.score) or not _is_better(best, measured, difference):
        return False
    best.best_step = measured.step
    best.best_score = measured.score
    best.best_metrics = measured.evaluation.metrics
    best.unit_scores = [] if units is None else units.scores
    return True


def _difference(best: BestCheckpoint, units: UnitScores | None) -> PairedDifference | None:
    """Returns the difference to the best step so far; None without one, or without scores of the same units."""
    if units is None or len(units.scores) != len(best.unit_scores):
        return None
    return paired_difference(units.scores, best.unit_scores, units.weights)


def _is_better(
    best: BestCheckpoint,
    measured: Measured,
    difference: PairedDifference | None,
) -> bool:
    if best.best_score is None:
        return True
    if difference is None:
        return measured.score > best.best_score
    return difference.is_positive


def choose_final(
    best: BestCheckpoint,
    last_step: int,
    metric: str,
) -> str:
    """Makes the last step the best one, unless the best one is better than it by more than noise.

    Returns the sentence about that; empty if the last step is the best one, or if nothing was evaluated.
    """
    first_step = best.best_step
    if first_step in (None, last_step):
        return ""
    name = METRIC_NAMES[metric]
    difference = _lead(best.last, last_step)
    if difference is None:
        return f"final/ is the adapter of step {first_step}, which has the {BEST_IS[metric]} {name}"
    units = best.last["units"]
    figures = f"{abs(difference.mean):.3g} ± {difference.stderr:.2g} over {difference.units:,} {units}"
    if difference.is_positive:
        lead = f"{name} is {BETTER_IS[metric]} by {figures}"
        return f"final/ is the adapter of step {first_step}: its {lead} than that of the last step"
    best.best_step = last_step
    best.best_metrics = best.last["metrics"]
    if difference.units < MIN_UNITS:
        return f"too few {units} to compare the {name} of steps {first_step} and {last_step}: final/ is the last step"
    return f"{name} differs by {figures} between steps {first_step} and {last_step}: final/ is the last step"


def _lead(last: Mapping[str, Any], last_step: int) -> PairedDifference | None:
    """Returns by how much the best step is better than the last; None if they cannot be compared, as where the loss of
    the last step is not finite."""
    stored = last.get("difference")
    if stored is None or not last["is_finite"] or last["step"] != last_step:
        return None
    return PairedDifference(-stored["mean"], stored["stderr"], stored["units"])
