"""The best metric of a run, from its summary or from its events."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lowrank_tune.json_files import as_mapping, get_number
from lowrank_tune.ui.formatting import short_label
from lowrank_tune.ui.run_list.entry import BestMetric

HELDOUT = "heldout/accuracy"
VALIDATION = "eval_loss"
LAST_VALUES = ("reward", "loss")
"""What a run without a best step is described by; an online algorithm has both."""


def best_of_summary(summary: Mapping[str, Any]) -> BestMetric | None:
    """Returns the metric of the best step, or else the last reward or loss."""
    best = as_mapping(summary.get("best"))
    # the figures of held-out answers, and not those of validation rows
    is_heldout = "eos_rate" in best
    value = get_number(
        best,
        "accuracy" if is_heldout else "loss",
        math.nan,
    )
    if not math.isnan(value):
        return _metric(
            HELDOUT if is_heldout else VALIDATION,
            value,
            best,
        )
    return last_of(as_mapping(summary.get("last")))


def best_of_evaluation(
    step: int,
    stats: Mapping[str, Any],
) -> BestMetric | None:
    """Returns the metric of an evaluation that was the best so far."""
    for name, key in ((HELDOUT, "heldout/policy/accuracy"), (VALIDATION, VALIDATION)):
        value = get_number(
            stats,
            key,
            math.nan,
        )
        if not math.isnan(value):
            return _metric(
                name,
                value,
                {"step": step},
            )
    return None


def last_of(stats: Mapping[str, Any]) -> BestMetric | None:
    """Returns the reward, or else the loss, of the last step."""
    for name in LAST_VALUES:
        value = get_number(
            stats,
            name,
            math.nan,
        )
        if not math.isnan(value):
            return _metric(
                name,
                value,
                stats,
            )
    return None


def _metric(
    name: str,
    value: float,
    figures: Mapping[str, Any],
) -> BestMetric:
    step = get_number(
        figures,
        "step",
        math.nan,
    )
    return BestMetric(
        name,
        short_label(name),
        value,
        None if math.isnan(step) else int(step),
    )
