"""Which step becomes `final/`: that of the lowest validation loss, or of the highest held-out accuracy.

The loss of validation pairs, of DPO and of reward models, and of answers with a label, of KTO, is noisy: one number for
each, often of few. There a step replaces the best one so far, and the best one replaces the last, only if the mean of
the paired differences of the losses is larger than its standard error. The loss of a row of SFT is a mean over many
tokens, and an overfitted run gets worse with each epoch: there the lowest loss decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lowrank_tune.evaluation.pair_losses import (
    MIN_PAIRS,
    PairedDifference,
    ValidationResult,
    paired_difference,
)
from lowrank_tune.training.checkpointer import BestCheckpoint

REASONS = {"accuracy": "answered most held-out questions", "loss": "had the lowest validation loss"}


@dataclass(frozen=True)
class Measured:
    """An evaluation of a step by the metric that selects the best one; a higher `score` is better."""

    step: int
    score: float
    metrics: dict[str, float]
    pair_losses: list[float] = field(default_factory=list)
    is_tie_better: bool = False

    @classmethod
    def by_loss(cls, step: int, validation: ValidationResult) -> Self:
        metrics = validation.metrics
        return cls(
            step,
            -metrics["loss"],
            metrics,
            validation.pair_losses,
        )

    @classmethod
    def by_accuracy(cls, step: int, metrics: dict[str, float]) -> Self:
        """Of steps with the same accuracy the later one is better: greedy accuracy saturates while sampled answers
        still improve."""
        return cls(
            step,
            metrics["accuracy"],
            metrics,
            is_tie_better=True,
        )


def update_best(best: BestCheckpoint, measured: Measured) -> bool:
    """Stores the evaluation as that of the last step, and as the best one if it is. Returns whether it is."""
    difference = _difference(best, measured)
    best.last = {
        "step": measured.step,
        "metrics": measured.metrics,
        "is_finite": math.isfinite(measured.score),
        "difference": None if difference is None else vars(difference),
    }
    if not math.isfinite(measured.score) or not _is_better(best, measured, difference):
        return False
    best.best_step = measured.step
    best.best_score = measured.score
    best.best_metrics = measured.metrics
    best.pair_losses = measured.pair_losses
    return True


def _difference(best: BestCheckpoint, measured: Measured) -> PairedDifference | None:
    """Returns the difference to the best step so far; None without one, or without losses of the same pairs."""
    if not measured.pair_losses or len(measured.pair_losses) != len(best.pair_losses):
        return None
    return paired_difference(measured.pair_losses, best.pair_losses)


def _is_better(
    best: BestCheckpoint,
    measured: Measured,
    difference: PairedDifference | None,
) -> bool:
    if best.best_score is None:
        return True
    if difference is not None:
        return difference.is_positive
    if measured.score == best.best_score:
        return measured.is_tie_better
    return measured.score > best.best_score


def choose_final(
    best: BestCheckpoint,
    last_step: int,
    metric: str,
    unit: str = "pairs",
) -> str:
    """By validation pairs or answers with a label (`unit`), makes the last step the best one unless the best one is
    better by more than noise.

    Returns the sentence about the step of `final/`; empty if the last step is the best one, or if nothing was
    evaluated.
    """
    first_step = best.best_step
    if first_step in (None, last_step):
        return ""
    difference = _lead(best.last, last_step)
    if difference is None:
        return f"final/ is the adapter of step {first_step}, which {REASONS[metric]}"
    figures = f"{abs(difference.mean):.3g} ± {difference.stderr:.2g} over {difference.pairs:,} {unit}"
    if difference.is_positive:
        return (
            f"final/ is the adapter of step {first_step}: its validation loss is lower by {figures} than that of the "
            "last step"
        )
    best.best_step = last_step
    best.best_metrics = best.last["metrics"]
    steps = f"steps {first_step} and {last_step}: final/ is the last step"
    if difference.pairs < MIN_PAIRS:
        return f"too few {unit} to compare the validation loss of {steps}"
    return f"validation loss differs by {figures} between {steps}"


def _lead(last: Mapping[str, Any], last_step: int) -> PairedDifference | None:
    """Returns by how much the best step is better than the last; None if they cannot be compared, as where the loss of
    the last step is not finite."""
    stored = last.get("difference")
    if stored is None or not last["is_finite"] or last["step"] != last_step:
        return None
    return PairedDifference(-stored["mean"], stored["stderr"], stored["pairs"])
