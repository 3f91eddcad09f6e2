"""The scores of held-out pairs after training: calibration, distribution, and score by length; read from
`scores.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lowrank_tune.json_files import (
    get_list,
    get_mapping,
    get_number,
    get_objects,
)
from lowrank_tune.ui.formatting import format_tick, percent
from lowrank_tune.ui.html import render
from lowrank_tune.ui.metrics import PAIR_SIDES
from lowrank_tune.ui.report.plots import (
    histogram_pair,
    reliability,
    scatter,
)
from lowrank_tune.ui.report.run_log import RunLog

MAX_SCORE = 1e30
FIGURE_LABELS = {
    "accuracy": "pairs whose chosen answer has the higher score",
    "margin": "mean {score} of the chosen above the rejected",
    "calibration_error": "calibration error: mean difference between confidence and accuracy",
    "length_correlation": "correlation of {score} and length",
    "prefers_longer": "pairs whose longer answer has the higher score",
}


@dataclass(frozen=True)
class Wording:
    """What the scores of an algorithm are called."""

    title: str
    score: str


REWARD_WORDING = Wording("Scores of held-out pairs", "score")
DPO_WORDING = Wording("Implicit rewards of held-out pairs", "implicit reward")


def scores(run_log: RunLog) -> Markup:
    """Returns the section, empty if the run has no scores."""
    logged = run_log.scores
    sides = {side: _floats(logged, side) for side in PAIR_SIDES}
    if not any(sides.values()):
        return Markup()
    tokens = {side: _floats(logged, f"{side}_tokens") for side in PAIR_SIDES}
    points = {side: list(zip(tokens[side], sides[side], strict=False)) for side in PAIR_SIDES}
    metrics = get_mapping(logged, "metrics")
    wording = REWARD_WORDING if run_log.algorithm == "reward" else DPO_WORDING
    return render(
        "pair_scores",
        wording=wording,
        pairs=get_number(logged, "pairs"),
        figures={name: _figure(metrics, name) for name in FIGURE_LABELS},
        rows=_rows(metrics, wording),
        reliability_svg=reliability(_reliability_bins(logged)),
        distribution_svg=histogram_pair(sides),
        length_svg=scatter(points),
    )


def _reliability_bins(logged: Mapping[str, Any]) -> list[tuple[float, float, int]]:
    bins = []
    for bucket in get_objects(logged, "reliability"):
        confidence = get_number(bucket, "confidence")
        accuracy = get_number(bucket, "accuracy")
        pairs = int(get_number(bucket, "pairs"))
        if 0.5 <= confidence <= 1 and 0 <= accuracy <= 1 and pairs > 0:
            bins.append((confidence, accuracy, pairs))
    return bins


def _rows(metrics: Mapping[str, Any], wording: Wording) -> list[tuple[str, str]]:
    """Returns label and figure of each known metric."""
    rows = []
    for name, label in FIGURE_LABELS.items():
        if name in metrics:
            rows.append((label.format(score=wording.score), _figure(metrics, name)))
    return rows


def _figure(metrics: Mapping[str, Any], name: str) -> str:
    value = get_number(metrics, name, math.nan)
    if not math.isfinite(value):
        return "unknown"
    if name == "length_correlation":
        return f"{value:+.2f}"
    if name == "margin":
        return format_tick(value)
    return percent(value)


def _floats(logged: Mapping[str, Any], name: str) -> list[float]:
    """Returns the numbers of a list, or none if one of its entries is not a finite number."""
    values = get_list(logged, name)
    if all(isinstance(value, (int, float)) and abs(value) < MAX_SCORE for value in values):
        return [float(value) for value in values]
    return []
