"""The labels of the training rows: how many of each, their lengths, and the weights that balance them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_tune.algorithms.kto import class_weights
from lowrank_tune.assembly.labels import label_counts
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import TokenizedDataset, TokenStats
from lowrank_tune.data.token_store import IntArray


@dataclass(frozen=True)
class LabelBalance:
    """Rows to train on by their label, the mean length of their answers in trained tokens, and the weights of both
    classes in the loss. `warning` is a sentence if there is only one class, else empty."""

    desirable: int
    undesirable: int
    desirable_tokens: float
    undesirable_tokens: float
    desirable_weight: float
    undesirable_weight: float
    warning: str


def label_balance(
    recipe: RecipeConfig,
    train: TokenizedDataset,
    stats: TokenStats,
) -> LabelBalance:
    """Compares the rows of both labels."""
    is_desirable = train.labels == 1
    desirable = int(is_desirable.sum())
    undesirable = len(train) - desirable
    weights = class_weights(
        recipe.kto.desirable_weight,
        recipe.kto.undesirable_weight,
        *label_counts(train, recipe.data.train),
    )
    warning = ""
    if len(train) and not (desirable and undesirable):
        kind = "desirable" if desirable else "undesirable"
        warning = f"all rows are {kind}: without rows of the other class the loss has no contrast"
    return LabelBalance(
        desirable,
        undesirable,
        int(stats.trained[is_desirable].sum()) / max(1, desirable),
        int(stats.trained[~is_desirable].sum()) / max(1, undesirable),
        *weights,
        warning,
    )


def contradictory_labels(parts: Sequence[TokenizedDataset]) -> list[IntArray]:
    """Returns for each part the rows whose conversation has the other label somewhere in these parts."""
    hashes = np.concatenate([part.conversation_hashes for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    both = np.intersect1d(hashes[labels == 1], hashes[labels == 0])
    return [np.flatnonzero(np.isin(part.conversation_hashes, both)) for part in parts]
