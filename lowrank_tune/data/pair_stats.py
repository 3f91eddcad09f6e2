"""What the sides of preference pairs differ in besides their worth: lengths, margins, and pairs that contradict each
other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.data.token_stats import TokenStats
from lowrank_tune.data.token_store import TokenizedDataset

# a share of pairs that is worth a warning, and the fewest pairs of which a share says anything
LENGTH_BIAS_SHARE = 0.65
MIN_PAIRS = 20


@dataclass(frozen=True)
class PairBalance:
    """Pairs to train on, by the length of their answers in trained tokens; `chosen` and `rejected` are the mean
    lengths.

    `margins` of them say by how much the chosen one should be ahead. `warning` is a sentence where length alone nearly
    tells the sides apart, else empty.
    """

    pairs: int
    longer: int
    shorter: int
    equal: int
    chosen: float
    rejected: float
    margins: int
    warning: str


def pair_balance(train: TokenizedDataset, stats: TokenStats) -> PairBalance:
    """The sides of all pairs of a store, from its census."""
    chosen = stats.trained[::2]
    rejected = stats.trained[1::2]
    longer = int((chosen > rejected).sum())
    shorter = int((chosen < rejected).sum())
    pairs = train.units
    return PairBalance(
        pairs,
        longer,
        shorter,
        pairs - longer - shorter,
        chosen=int(chosen.sum()) / max(1, pairs),
        rejected=int(rejected.sum()) / max(1, pairs),
        margins=int(np.count_nonzero(train.margins[::2])),
        warning=_length_bias_warning(pairs, longer, shorter),
    )


def _length_bias_warning(pairs: int, longer: int, shorter: int) -> str:
    most, word = max((longer, "longer"), (shorter, "shorter"))
    if pairs < MIN_PAIRS or most < LENGTH_BIAS_SHARE * pairs:
        return ""
    return (
        f"in {100 * most / pairs:.0f} % of the pairs the chosen answer is the {word} one: a model can look right by "
        f"preferring what is "
        f"{word}, whatever it says; watch the length of its answers, or balance the pairs"
    )


def contradictory_pairs(parts: Sequence[TokenizedDataset]) -> list[NDArray[np.int64]]:
    """For each part the pairs that stand, in any part, the other way round too."""
    hashes = [part.conversation_hashes.reshape(-1, 2) for part in parts]
    seen = {(chosen, rejected) for pairs in hashes for chosen, rejected in pairs.tolist()}
    return [np.flatnonzero([(rejected, chosen) in seen for chosen, rejected in pairs.tolist()]) for pairs in hashes]
