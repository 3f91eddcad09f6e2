"""What becomes of a completion that a reward could not judge: never a 0."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_tune.rewards.protocol import Score
from lowrank_tune.rewards.uses import Weighted


def failed(weighted: Sequence[Weighted], scores: Sequence[Score]) -> tuple[Weighted, Score] | None:
    """The first reward that could not tell what a completion is worth, with its score; one that stops the run before one that drops."""
    lost = [(each, score) for each, score in zip(weighted, scores, strict=True) if score.value is None]
    return min(lost, key=lambda one: one[0].on_error != "stop", default=None)
