"""How many training rows are desirable and how many are not, and the weights that balance the two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_tune.algorithms.kto import class_weights
from lowrank_tune.config import KTOConfig, SourceConfig
from lowrank_tune.data import TokenizedDataset
from lowrank_tune.events import Emit, LogMessage, warning

LabelCounts = tuple[float, float]
"""Desirable and undesirable rows."""


def label_counts(train: TokenizedDataset, sources: Sequence[SourceConfig]) -> LabelCounts:
    """Returns the desirable and the undesirable rows of an epoch: with weights of the sources, as many as are drawn."""
    factors = np.ones(len(train))
    if sources[0].weight is not None:
        rows_of_source = np.bincount(train.source_of, minlength=len(sources))
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        factors = (weights * len(train) / np.maximum(1, rows_of_source))[train.source_of]
    is_desirable = train.labels == 1
    return float(factors[is_desirable].sum()), float(factors[~is_desirable].sum())


def log_labels(
    settings: KTOConfig,
    counts: LabelCounts,
    emit: Emit,
) -> None:
    """Emits the counts and the weights of both classes, and a warning if there is only one class."""
    desirable, undesirable = counts
    weights = class_weights(settings.desirable_weight, settings.undesirable_weight, *counts)
    message = (
        f"{desirable:,.0f} desirable and {undesirable:,.0f} undesirable rows an epoch; kto.desirable_weight is "
        f"{weights[0]:.4g}, kto.undesirable_weight {weights[1]:.4g}"
    )
    emit(LogMessage(message=message))
    if not desirable or not undesirable:
        kind = "desirable" if desirable else "undesirable"
        emit(
            warning(
                f"all training rows are {kind}: without rows of the other class the loss has no contrast; add some, or "
                "train the desirable answers with `algorithm: sft`"
            )
        )
